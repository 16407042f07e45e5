"""Peak memory of the first steps: `python -m benchmarks memory` measures what it says."""

from __future__ import annotations

import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import medians, read

from benchmarks import memory, rows as row_files

pytestmark = pytest.mark.usefixtures("restore_threads")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
READINGS = {  # of a scripted meter, in MiB
    "now": [100, 110, 120],  # with parameters and gradients, before the first and the second step
    "peak": [115, 150, 160],  # while the optimizer was made, of the first and the second step
}
QUICK_PIPELINES = ("torch_foreach", "fusedopt")  # as many as there are processes at a time


def test_quick_memory(cpu_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    # What is measured is what this process imports, whatever else a new one would find.
    (tmp_path / "fusedopt.py").write_text("raise ImportError('another fusedopt')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "memory.csv"
    if memory.main(["--quick", "--out", str(out), "--pipelines", *QUICK_PIPELINES]) == 1:
        pytest.skip("/proc/self/clear_refs is not writable here")
    rows = read(out)
    assert all("backend cpu" in row["note"] for row in rows if "fusedopt" in row["pipeline"])
    assert {row["figure"] for row in rows} == set(memory.COLUMNS)
    figures = {name: {p: v for (_, p), v in medians(rows, name).items()} for name in memory.COLUMNS}
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
    assert added_second["fusedopt"] < params / 1000 + 0.25
    assert added_second["torch_foreach"] > 0.9 * params


@pytest.mark.parametrize(
    ("pipeline", "dtype", "built"),
    [
        ("torch_foreach", "fp32", 115),
        ("torch_fused", "bf16", 115),
        ("fusedopt", "bf16", 115),
        ("fusedopt_init_state", "fp32", 170),  # the peak lies before the step
    ],
)
def test_measuring_with_the_meters_of_a_gpu(
    pipeline: str, dtype: str, built: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[str] = []

    def scripted(name: str) -> memory.Meter:
        now = iter(READINGS["now"])
        peak = iter([built, *READINGS["peak"][1:]])
        mib = lambda readings: lambda: next(readings) << 20  # noqa: E731
        return memory.Meter(name, mib(now), lambda: resets.append(name), mib(peak))

    monkeypatch.setattr(
        memory, "meters", lambda _: [scripted(n) for n in ("allocated", "reserved")]
    )
    monkeypatch.setitem(memory.LISTS, "small", lambda: [(40, 5), (7,)])
    monkeypatch.setattr(memory, "WARM_UP_LIST", "small")
    found, note = memory.measure(memory.Job("small", dtype, pipeline, CPU, 1))
    bf16 = dtype == "bf16"
    state = (2 * 4 * 207 + (4 * 207 if bf16 else 0) + 2 * 4) / memory.MIB  # with step counts
    first = max(built - 100, 50)
    expected = {"first_peak": first, "first_added": 40, "second_peak": 60, "second_added": 40,
                "first_beyond_state": first - state, "second_beyond_state": 60 - state}  # fmt: skip
    expected |= {f"reserved_{name}": value for name, value in expected.items()}
    wanted = {f"{name}_mib": value for name, value in expected.items()}
    assert found == pytest.approx({"state_mib": state} | wanted)
    assert resets == ["allocated"] * 3
    assert note.startswith("params 0.0 MiB") and ("backend" in note) == ("fusedopt" in pipeline)


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


def test_memory_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command for a GPU, with the processes that would measure replaced."""
    jobs, checked = [], []
    names = [*memory.COLUMNS, *(f"reserved_{name}" for name in memory.COLUMNS[1:])]

    def in_a_process(job: memory.Job) -> tuple[dict[str, float], str]:
        jobs.append(job)
        return dict.fromkeys(names, 3.0 + memory.PIPELINES.index(job.pipeline)), "backend cuda"

    monkeypatch.setattr(memory, "check_same_step", lambda *arguments: checked.append(arguments))
    monkeypatch.setattr(memory, "in_a_process", in_a_process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")
    monkeypatch.setattr(row_files, "RESULTS", tmp_path)
    assert memory.main(["--device", "cuda"]) == 0
    assert [(dtype, sorted(names), device) for dtype, names, device in checked] == [
        (dtype, sorted(memory.PIPELINES), CUDA) for dtype in ("fp32", "bf16")
    ]
    assert {job.device for job in jobs} == {CUDA}
    assert len(jobs) == 2 * 4 * 3  # dtypes, pipelines, runs
    assert memory.processes_at_a_time("llama-3.2-1B", CUDA) == 1
    rows = read(tmp_path / "local" / "nvidia-h100-80gb.csv")
    assert {row["machine"] for row in rows} == {"NVIDIA H100 80GB"}
    assert {row["figure"] for row in rows} == set(names)
    values = {pipeline: f"{3 + i} {3 + i} {3 + i}" for i, pipeline in enumerate(memory.PIPELINES)}
    assert all(row["values"] == values[row["pipeline"]] for row in rows)
    assert "reserved first peak" in capsys.readouterr().out


def test_too_little_memory_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert memory.main(["--quick", "--pipelines", "fusedopt"]) == 1
    assert "gpt-10M-fp32 not measured: needs 0.4 GiB of free memory" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pipelines_that_take_other_steps_are_not_compared(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.check_same_step(dtype, memory.PIPELINES, CPU)
    monkeypatch.setattr(memory, "MAX_GRAD_NORM", 0.5)  # of ours alone
    for names in (memory.PIPELINES, ["fusedopt", "fusedopt_init_state"]):
        assert memory.main(["--quick", "--dtypes", dtype, "--pipelines", *names]) == 1
        assert "not measured: the two pipelines take different steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (MemoryError("no room\nadvice"), "MemoryError: no room$"),
        (BrokenProcessPool("killed"), "the process was ended: out of memory"),
        (({}, "params 1 MiB; backend reference"), "only its reference backend"),
    ],
)
def test_a_process_that_measures_nothing_is_reported(
    result: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        """In the place of a pool of one."""

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: object) -> Process:
            return self

        def result(self) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Process)
    with pytest.raises(memory.NotMeasured, match=reason):
        memory.in_a_process(memory.Job("gpt-1M", "fp32", "fusedopt", CPU, 1))
