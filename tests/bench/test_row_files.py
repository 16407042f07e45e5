"""Where the commands of the benchmarks put their rows: a run leaves a checkout as it was."""

from __future__ import annotations

import csv
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("numpy")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import compare, row_files  # noqa: E402
from benchmarks.__main__ import COMMANDS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CPU, GPU = "A CPU (R) 7", "NVIDIA H100 80GB"
# Commands that write rows, and the end of their files' names.
WRITERS = {
    "cpu": "",
    "host": "",
    "kernels": "",
    "gpu": "",
    "instructions": "-instructions",
    "memory": "-memory",
    "profile": "-profile",
}
writers = pytest.mark.parametrize("command", WRITERS)


def module(command: str) -> Any:
    return importlib.import_module(f"benchmarks.{COMMANDS[command]}")


def rows_of(command: str, *options: str) -> Path | None:
    """The file that a run would write to."""
    args = module(command).parse(options)
    if command == "gpu":
        report = importlib.import_module("benchmarks.gpu.report")
        return report.output(args, SimpleNamespace(dry=False, name=GPU))
    return args.out


@pytest.fixture(autouse=True)
def cpu_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "cpu_model", lambda: CPU)


@writers
def test_rows_go_to_a_file_that_git_ignores(command: str) -> None:
    out = rows_of(command)
    assert out is not None and out.parent == RESULTS / "local"
    machine = "nvidia-h100-80gb" if command == "gpu" else "a-cpu-r-7"
    assert out.name == f"{machine}{WRITERS[command]}.csv"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    asked = subprocess.run(["git", "check-ignore", "-q", str(out)], cwd=ROOT)
    assert asked.returncode == 0


@writers
def test_the_tracked_file_is_written_on_request(command: str) -> None:
    local, tracked = rows_of(command), rows_of(command, "--record")
    assert local is not None and tracked == RESULTS / local.name
    assert rows_of(command, "--quick", "--record") == tracked


@writers
def test_quick_runs_write_none_and_any_file_can_be_named(command: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert rows_of(command, "--quick") is None
    assert rows_of(command, "--out", str(out)) == rows_of(command, "--quick", "--out", str(out))
    assert rows_of(command, "--out", str(out)) == out


@writers
def test_one_place_at_a_time(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module(command).parse(["--out", "rows.csv", "--record"])
    assert "not allowed with" in capsys.readouterr().err


def test_every_command_is_known_to_this_test() -> None:
    others = {"list", "roofline", "compare", "plot", "tables"}  # these measure nothing
    assert {*WRITERS} == {*COMMANDS} - others


@pytest.mark.parametrize("command", ["gpu", "kernels"])
@pytest.mark.parametrize("place", [["--record"], ["--out", str(RESULTS / "local" / "x.csv")]])
def test_a_dry_run_is_not_recorded(
    command: str, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backends", "cuda", "triton"] if command == "kernels" else []
    with pytest.raises(SystemExit):
        module(command).parse([*options, "--dry-run", *place])
    assert "measures nothing" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [False, True])
def test_goals_of_a_gpu_are_for_those_who_ask_and_explained(
    asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = module("gpu")
    dry = importlib.import_module("benchmarks.gpu.machine").DryRun
    machine = dry.__new__(dry)  # without what stands in for a GPU
    machine.backends = {"cuda": "cpu", "triton": "cpu"}
    monkeypatch.setattr(step, "find_machine", lambda dry: machine)
    monkeypatch.setattr(step.Run, "all", lambda self: None)
    monkeypatch.setattr(step.signal, "signal", lambda *_: None)
    assert step.main(["--dry-run", *(["--goals"] if asked else [])]) == 0
    told = capsys.readouterr().out
    say = importlib.import_module("benchmarks.gpu.report").GOALS_SAY
    assert (say in told, "| wanted |" in told, "H200" in told) == (asked,) * 3


def write(path: Path, **changes: str) -> None:
    row = dict.fromkeys(compare.NEEDED, "1") | {"dirty": "0", "timestamp": "2026"} | changes
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*row])
        writer.writeheader()
        writer.writerow(row)


def test_a_commit_is_compared_wherever_its_rows_are(tmp_path: Path) -> None:
    write(tmp_path / "cpu.csv", commit="a" * 40)
    write(tmp_path / "local" / "cpu.csv", commit="b" * 40, ratio_p50="2")
    (change,) = compare.changes(*(compare.read(c * 40, tmp_path) for c in "ab"))
    assert (change.old.p50, change.new.p50) == (1.0, 2.0)


def test_old_names_of_pipelines_are_read_as_todays(tmp_path: Path) -> None:
    for name, pipeline in {"old": "stock_scaler", "new": "amp_scaling"}.items():
        ours = f"fusedopt_adamw_{pipeline}_reference"
        write(tmp_path / f"{name}.csv", commit="a" * 40, pipeline=ours, reference="adamw_fused")
    old, new = (compare.read(str(tmp_path / f"{name}.csv")) for name in ("old", "new"))
    assert len(compare.changes(old, new)) == 1


def test_every_row_of_a_step_is_of_a_pipeline_of_today() -> None:
    registry = importlib.import_module("benchmarks.registry")
    named = {
        row["pipeline"]
        for path in RESULTS.glob("*.csv")
        for row in row_files.read(path)
        if row.get("ratio_p50") and ":" not in row["pipeline"]
    }
    assert "fusedopt_adamw_amp_scaling" in named
    assert named <= {*registry.KINDS}
