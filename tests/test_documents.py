"""What README and docs claim: their code runs, their figures stand in a results row, links lead
somewhere."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")

# A measured figure, as all are written: median, then p20 and p80 of the same samples.
FIGURE = re.compile(r"(\d+\.\d+)x? \[(\d+\.\d+)\u2013(\d+\.\d+)\]")
CLAIM = re.compile(r"\*\*(\d+\.\d+)x\*\*")

DOCUMENTS_OF_THE_CHECKOUT = pytest.mark.skipif(
    not (ROOT / "docs").is_dir(), reason="the documents are not here"
)
pytestmark = DOCUMENTS_OF_THE_CHECKOUT


def blocks() -> Iterator[Any]:
    for path, name in zip(DOCUMENTS, NAMES, strict=True):
        for number, match in enumerate(CODE.finditer(path.read_text())):
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
    }


@pytest.mark.parametrize("code", list(blocks()))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled = compile(code, "document", "exec")
    if '"cuda"' in code and not torch.cuda.is_available():
        return  # that it is Python is all that can be said here
    namespace = given_names()
    exec("import torch\nimport fusedopt", namespace)
    exec(compiled, namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    broken = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not broken


def measured() -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """Rows by their figures as a document rounds them: of the ratio, and of the ceiling."""
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                triple = tuple(
                    f"{float(row[f'ratio_{p}'] or 'nan'):.2f}" for p in ("p50", "p20", "p80")
                )
                found.setdefault(triple, []).append(row)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_figures_stand_in_results(path: Path) -> None:
    text, rows = path.read_text(), measured()
    for figure in FIGURE.findall(text):
        assert figure in rows, f"no row of benchmarks/results has {figure}"
        commits = {row["commit"][:7] for row in rows[figure] if row["dirty"] == "0"}
        assert any(commit in text for commit in commits), (
            f"{figure} was measured at {sorted(commits)}, which the document does not name"
        )


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_claims_repeat_a_figure(path: Path) -> None:
    text = path.read_text()
    medians = {figure[0] for figure in FIGURE.findall(text)}
    assert set(CLAIM.findall(text)) <= medians


def test_messages_are_ours() -> None:
    """The words by which troubleshooting.md is searched stand in an error that we raise."""
    sources = (path.read_text() for path in (ROOT / "fusedopt").rglob("*.py"))
    text = "\n".join(sources)
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(messages) > 10
    assert [message for message in messages if message not in text] == []


def test_there_are_figures_and_code() -> None:
    assert len(list(blocks())) >= 3
    assert len(FIGURE.findall((ROOT / "README.md").read_text())) >= 10
