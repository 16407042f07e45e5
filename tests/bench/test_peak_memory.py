"""Peak memory of the first steps: `python -m benchmarks memory` measures what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_helpers
import pytest
import torch
from bench_helpers import medians, read

from benchmarks import memory, rows as row_files

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
READINGS = {  # of a scripted meter, in bytes
    "now": [100, 110, 120],  # with parameters and gradients, before the first and the second step
    "peak": [115, 150, 160],  # while the optimizer was made, of the first and the second step
}
one_thread = bench_helpers.one_thread


QUICK_PIPELINES = ("torch_foreach", "fusedopt", "fusedopt_init_state")


def test_quick_memory(
    cpu_backend: str, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    # What is measured is what this process has imported, whatever else is on the path by now.
    (tmp_path / "fusedopt.py").write_text("raise ImportError('another fusedopt')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rows = quick_rows(tmp_path / "memory.csv")
    assert all("backend cpu" in row["note"] for row in rows if "fusedopt" in row["pipeline"])
    assert {row["figure"] for row in rows} == set(memory.COLUMNS)
    hold_promises({name: by_pipeline(rows, name) for name in memory.COLUMNS})


def quick_rows(out: Path) -> list[dict[str, str]]:
    options = ["--quick", "--out", str(out), "--pipelines", *QUICK_PIPELINES]
    assert memory.main(options) == 0
    rows = read(out)
    if any("lower bounds" in row["note"] for row in rows):
        pytest.skip("/proc/self/clear_refs is not writable here")
    return rows


def by_pipeline(rows: list[dict[str, str]], name: str) -> dict[str, float]:
    return {pipeline: value for (_, pipeline), value in medians(rows, name).items()}


def hold_promises(figures: dict[str, dict[str, float]]) -> None:
    params = 4 * 10_000_000 / memory.MIB
    assert set(figures["state_mib"]) == set(QUICK_PIPELINES)
    for state in figures["state_mib"].values():
        assert state == pytest.approx(2 * params, rel=1e-3)
    for name in ("first_beyond_state_mib", "second_beyond_state_mib"):
        beyond = figures[name]  # huge pages are handed out whole, 2 MiB each
        assert beyond["torch_foreach"] > 0.9 * params
        assert -1 < beyond["fusedopt"] < 2.5
    added_first, added_second = figures["first_added_mib"], figures["second_added_mib"]
    assert added_first["fusedopt"] == pytest.approx(2 * params, abs=2.5)
    assert added_first["fusedopt_init_state"] < params / 1000 + 0.25
    for pipeline in ("fusedopt", "fusedopt_init_state"):
        assert added_second[pipeline] < params / 1000 + 0.25
    assert added_second["torch_foreach"] > 0.9 * params


def scripted(name: str, resets: list[str]) -> memory.Meter:
    """A meter that reads what it was given, as a GPU's allocator would."""
    now, peak = (iter(READINGS[reading]) for reading in ("now", "peak"))
    reset = lambda: resets.append(name)  # noqa: E731
    return memory.Meter(name, True, lambda: next(now), reset, lambda: next(peak))


@pytest.mark.parametrize("pipeline", memory.PIPELINES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_measuring_with_the_meters_of_a_gpu(
    pipeline: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[str] = []
    monkeypatch.setattr(
        memory, "meters", lambda _: [scripted(n, resets) for n in ("allocated", "reserved")]
    )
    monkeypatch.setitem(memory.LISTS, "small", lambda: [(40, 5), (7,)])
    monkeypatch.setattr(memory, "WARM_UP_LIST", "small")
    job = memory.Job("small", dtype, pipeline, "cpu", torch.get_num_threads())
    measured = json.loads(json.dumps(memory.measure(job)))
    expected = {"first_peak": 50, "first_added": 40, "second_peak": 60, "second_added": 40}
    assert measured["peaks"] == {"allocated": expected, "reserved": expected}
    assert resets == ["allocated"] * 3
    states = 2 * 4 * 207 + (4 * 207 if dtype == "bf16" else 0)
    assert measured["state_bytes"] == states + 2 * 4  # step counts
    assert measured["param_bytes"] == 207 * (2 if dtype == "bf16" else 4)
    assert bool(measured["backend"]) == pipeline.startswith("fusedopt")


def test_the_peak_while_state_is_made_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With init_state() the peak may lie before the step."""
    monkeypatch.setitem(READINGS, "peak", [170, 150, 160])
    monkeypatch.setattr(memory, "meters", lambda _: [scripted("allocated", [])])
    monkeypatch.setitem(memory.LISTS, "small", lambda: [(7,)])
    monkeypatch.setattr(memory, "WARM_UP_LIST", "small")
    job = memory.Job("small", "fp32", "fusedopt", "cpu", torch.get_num_threads())
    assert memory.measure(job)["peaks"]["allocated"]["first_peak"] == 70


def test_meters_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda n=name: calls.append(n) or 1)
        monkeypatch.setattr(torch.cuda, f"max_{name}", lambda n=name: calls.append(f"max_{n}") or 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    allocated, reserved = memory.meters(CUDA)
    assert (allocated.now(), allocated.peak(), reserved.now(), reserved.peak()) == (1, 2, 1, 2)
    reserved.reset_peak()
    names = ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"]
    assert calls == [*names, "reset"]


def test_without_proc_the_figures_are_lower_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied() -> None:
        raise PermissionError

    monkeypatch.setattr(memory, "_reset_resident", denied)
    (meter,) = memory.meters(CPU)
    assert not meter.exact
    assert meter.peak() >= meter.now() > 10 << 20


def test_memory_on_a_gpu(
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command for a GPU, with the processes that would measure replaced."""
    jobs = []

    def run_child(job: memory.Job) -> dict[str, Any]:
        jobs.append(job)
        peaks = dict.fromkeys(("first_peak", "first_added", "second_peak", "second_added"), 3 << 20)
        return {
            **{"param_bytes": 1 << 20, "state_bytes": 2 << 20, "backend": "cuda", "exact": True},
            "peaks": {"allocated": peaks, "reserved": peaks},
        }

    checked = []
    monkeypatch.setattr(memory, "check_same_step", lambda *arguments: checked.append(arguments))
    monkeypatch.setattr(memory, "run_child", run_child)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")
    monkeypatch.setattr(row_files, "RESULTS", tmp_path)
    assert memory.main(["--device", "cuda"]) == 0
    assert [(dtype, sorted(names), device) for dtype, names, device in checked] == [
        (dtype, sorted(memory.PIPELINES), CUDA) for dtype in ("fp32", "bf16")
    ]
    assert {job.device for job in jobs} == {"cuda"}
    assert len(jobs) == 2 * 4 * 3  # dtypes, pipelines, runs
    assert memory.processes_at_a_time("llama-3.2-1B", CUDA) == 1
    rows = read(tmp_path / "local" / "nvidia-h100-80gb.csv")
    assert {row["machine"] for row in rows} == {"NVIDIA H100 80GB"}
    wanted = set(memory.COLUMNS) | {f"reserved_{name}" for name in memory.COLUMNS[1:]}
    assert {row["figure"] for row in rows} == wanted
    assert {row["values"] for row in rows if "beyond" in row["figure"]} == {"1 1 1"}
    assert "reserved first peak" in capsys.readouterr().out


def test_too_little_memory_is_reported(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert memory.main(["--quick"]) == 1
    assert "gpt-10M-fp32 not measured: needs 0.4 GiB of free memory" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pipelines_that_take_other_steps_are_not_compared(
    dtype: str,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory.check_same_step(dtype, memory.PIPELINES, CPU)
    monkeypatch.setattr(memory, "MAX_GRAD_NORM", 0.5)  # of ours alone
    for names in (memory.PIPELINES, ["fusedopt"], ["fusedopt", "fusedopt_init_state"]):
        assert memory.main(["--quick", "--dtypes", dtype, "--pipelines", *names]) == 1
        assert "not measured: the two pipelines take different steps" in capsys.readouterr().out


def test_the_reference_backend_is_not_taken_for_ours(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "run_child", lambda job: {"backend": "reference"})
    assert memory.main(["--quick", "--pipelines", "fusedopt"]) == 1
    assert "only its reference backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [
        (1, "Traceback\nMemoryError: no room\n", "MemoryError: no room"),
        (1, "", "no message"),
        (-9, "", "by signal 9"),
    ],
)
def test_a_process_that_fails_is_reported(
    status: int, stderr: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=status, stdout="", stderr=stderr)
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(memory.NotMeasured, match=reason):
        memory.run_child(memory.Job("gpt-1M", "fp32", "fusedopt", "cpu", 1))
