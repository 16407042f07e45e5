"""What README and docs claim: their code runs, their commands, files and links exist.

Beside it: measured tables, test_tables.py; lists of messages and arguments, test_differences.py;
the worked example of an optimizer, test_worked_example.py.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "benchmarks/results/README.md")
DOCUMENTS = [
    *(ROOT / name for name in TOP if (ROOT / name).is_file()),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
FOLDERS = ("tests", "benchmarks", "fusedopt", "csrc", "docs", "examples", ".ci", ".github")
PATH = re.compile(rf"(?<![\w./<>-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./{{}},*<>…-]*")
COMMAND = re.compile(r"python -m (benchmarks|fusedopt)(?:\.([\w.]+))?((?: [^\s`#]+)*)")

# Named by a page and not in a checkout: made by the build, the worked example or the plots.
MADE = {"fusedopt/_build_config.py", "examples/out", "docs/pictures"}

pytestmark = [
    pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not here"),
    pytest.mark.filterwarnings("ignore::fusedopt.FusedOptFallbackWarning"),
]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)


# ---- code ----------------------------------------------------------------------------------------


def blocks() -> Iterator[Any]:
    """All but quotations, which have the name of their file above: test_worked_example.py."""
    for path, name in zip(DOCUMENTS, NAMES, strict=True):
        if path.name == "distributed.md":
            continue  # on several ranks: tests/distributed/test_document.py
        text = re.sub(r"^`\S+`\n```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for number, match in enumerate(CODE.finditer(text)):
            yield pytest.param(match[1], id=f"{name}-{number}")


def given_names() -> dict[str, Any]:
    """What a block about something else takes for granted: a model, data, a loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = [(torch.randn(4, 8, device=device), torch.randn(4, 2, device=device))] * 3
    return {
        "model": torch.nn.Linear(8, 2, device=device),
        "batches": batches,
        "next_batch": lambda: batches[0],
        "next_lr": lambda: 1e-3,
        "loss_fn": torch.nn.functional.mse_loss,
        "torch": torch,
        "fusedopt": fusedopt,
    }


@pytest.mark.parametrize("code", list(blocks()))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        if "torch.cuda." in code:
            compile(code, "document", "exec")
            return  # that it is Python is all that can be said here
        code = code.replace('"cuda"', '"cpu"')
    exec(compile(code, "document", "exec"), given_names())


def test_there_is_code() -> None:
    assert len(list(blocks())) >= 15


# ---- what is named -------------------------------------------------------------------------------


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    broken = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not broken


def spelled_out(path: str) -> list[str]:
    """``a_{b,c}.py`` is two files."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


@every_document
def test_files_exist(path: Path) -> None:
    text = DIFF.sub("", path.read_text())
    text = re.sub(r"\]\([^)]*\)", "]", text)  # links have a test of their own
    named = {name.rstrip(".,") for name in PATH.findall(text)}
    files = [f for name in named if not {"<", "…"} & set(name) for f in spelled_out(name)]
    missing = [f for f in files if f.rstrip("/") not in MADE and not list(ROOT.glob(f.rstrip("/")))]
    assert sorted(missing) == []


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool's table of commands, wherever the package under test was imported from."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not here")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    return importlib.import_module("benchmarks.__main__")


@every_document
def test_commands_exist(path: Path, benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every ``python -m benchmarks COMMAND --flag``, and the modules behind ``python -m``."""
    for package, module, words in COMMAND.findall(path.read_text()):
        if module:
            assert (ROOT / package / f"{module.replace('.', '/')}.py").is_file(), module
        elif package == "benchmarks" and words:
            command, *flags = words.split()
            if command.isupper() or "…" in command:
                continue
            assert command in benchmarks.COMMANDS, f"python -m benchmarks {command}"
            with pytest.raises(SystemExit) as ended:
                benchmarks.main([command, "--help"])
            assert ended.value.code == 0
            told = capsys.readouterr().out
            unknown = [flag for flag in flags if flag.startswith("--") and flag not in told]
            assert not unknown, f"python -m benchmarks {command}"


@every_document
def test_extras_exist(path: Path) -> None:
    """``pip install '.[test]'``"""
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE))
    named = {
        name
        for found in re.findall(r"\.\[([\w,]+)\]", path.read_text())
        for name in found.split(",")
    }
    assert named <= extras


@functools.cache
def variables_of_the_sources() -> set[str]:
    folders = [ROOT / name for name in ("fusedopt", "tests", "benchmarks", ".ci", "csrc")]
    files = [file for folder in folders for file in folder.rglob("*")] + list(ROOT.glob("*.py"))
    texts = (f.read_text() for f in files if f.suffix in ("", ".py", ".sh", ".h") and f.is_file())
    return {name for text in texts for name in re.findall(r"\bFUSEDOPT_[A-Z_]+\b", text)}


@every_document
def test_variables_exist(path: Path) -> None:
    """Environment variables are read somewhere."""
    named = set(re.findall(r"\bFUSEDOPT_[A-Z_]+\b", path.read_text()))
    assert named <= variables_of_the_sources()


@every_document
def test_names_of_the_package_exist(path: Path) -> None:
    """``fusedopt.something`` in inline code."""
    named = set(re.findall(r"`fusedopt\.(\w+)[`(.]", path.read_text()))
    modules = {file.stem for file in Path(fusedopt.__file__).parent.iterdir()}
    assert {name for name in named if not hasattr(fusedopt, name) and name not in modules} == set()


# ---- promises ------------------------------------------------------------------------------------


def functions_named(text: str) -> Iterator[tuple[str, str]]:
    """``tests/step/test_x.py::test_y``, and after it ``::test_z`` of the same file."""
    file = ""
    for match in re.finditer(r"`(tests/[\w./]+\.py)?(?:::(\w+))?`", text):
        file = match[1] or file
        if match[2]:
            yield file, match[2]


@every_document
def test_tests_exist(path: Path) -> None:
    named = list(functions_named(path.read_text()))
    sources = {file: (ROOT / file).read_text() for file, _ in named}
    assert [pair for pair in named if f"def {pair[1]}(" not in sources[pair[0]]] == []
