"""How the GPU benchmark measures: what it refuses to time, its clocks and its counters."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bench_helpers import rows as row_files
from torch.autograd import DeviceType

from benchmarks import (
    cases as all_of_them,
    clocks,
    gpu as gpu_package,
    kernels,
    measure,
    param_sets,
    pipelines,
    registry,
    rivals,
    verbs,
)
from benchmarks.gpu import (
    first_step as gpu_first_step,
    kernels as gpu_kernels,
    machine as gpu_machine,
    streams as gpu_streams,
)
from fusedopt.backends import triton

CPU = {"cuda": "cpu", "triton": "cpu"}
CASES = all_of_them.gpu_cases()


class Wrong(pipelines.Pipeline):
    def step(self) -> None:
        self.scaler.step(self.optimizer)  # not clipped
        self.scaler.update()


def without_shim() -> gpu_machine.DryRun:
    """A DryRun that leaves the CUDA backend of this process as it is."""
    return gpu_machine.DryRun.__new__(gpu_machine.DryRun)


def measured(name: str, rounds: int = 3, **kinds: pipelines.Kind) -> dict[str, measure.Result]:
    machine, case = without_shim(), CASES[name].shrunk()
    every = registry.gpu_kinds({"cuda": "cpu", "triton": "triton"}) | kinds
    clock = clocks.EventClock(machine, case.numel)
    bench = measure.Bench(lambda _: clock, every, rounds, rounds, builds=1)
    return {r.comparison.reference: r for r in measure.run_case(case, bench)}


def test_another_step_is_not_timed(cpu_backend):
    adamw = rivals.torch_adamw(fused=True)
    kind = pipelines.Kind("fused", 48, lambda p, g: Wrong(p, g, adamw))
    items = measured("adamw-10M", adamw_fused=kind)
    assert items["adamw_fused"].wrong and not items["adamw_fused"].trials
    assert "different steps" in items["adamw_fused"].note
    assert [len(t.own) for t in items["adamw_foreach"].trials] == [3, 3, 3]  # three clocks


def test_without_triton_its_pipelines_are_named_and_not_timed(cpu_backend, monkeypatch):
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton is not installed")
    items = measured("sgd-resnet50", 1)
    absent = items["fusedopt_sgd_triton"]
    assert absent.note == "Triton is not installed" and not absent.wrong and not absent.trials
    assert len(items["sgd_fused"].trials) == 1
    machine = without_shim()
    machine.backends = {"cuda": "cpu", "triton": "triton"}
    assert gpu_machine.no_triton(machine) == "Triton is not installed"


def test_a_first_step_that_fails_says_why(monkeypatch):
    def failed(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no compiler\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match="the first step failed: RuntimeError: no compiler"):
        gpu_first_step.add_first_steps(without_shim(), row_files.Report({}, None))


def swept(*options: str, machine: gpu_machine.DryRun | None = None) -> kernels.Sweep:
    options = ("--rules", "sgd", "--backends", "cuda", "triton", "--dry-run", *options)
    args = kernels.parse(["--sizes", "10:12", *options])
    sweep = kernels.Sweep(args, machine or without_shim())
    sweep.all(lambda: None)
    return sweep


def timed(sweep: kernels.Sweep) -> set[tuple[str, str]]:
    rows = [row for row in sweep.report.rows if "kernel" in row["case"]]
    return {(row["case"][-2:], row["pipeline"]) for row in rows}


def test_a_sweep_names_what_it_leaves_out(cpu_backend, monkeypatch):
    assert not swept().failed
    late = swept("--budget", "1e-9")
    assert late.notes == ["triton: not measured: the CPU backend stands in for it"] + [
        f"kernel-2^{k}, sgd:float32: not measured, no time left" for k in (10, 12)
    ]
    machine = without_shim()
    per_param = kernels.BESIDES_ON_GPU + 8  # one backend: param and gradient
    monkeypatch.setattr(machine, "free_bytes", lambda: per_param << 11)
    sweep = swept(machine=machine)
    assert sweep.notes[1:] == ["kernel-2^12, sgd:float32: needs 0.0 GiB more than are free"]
    both = ("fusedopt_cuda:reduce:float32", "fusedopt_cuda:update:sgd:float32")
    assert timed(sweep) == {("10", kernel) for kernel in both}


def test_a_backend_with_another_step_is_not_swept(cpu_backend, monkeypatch):
    def check(workload, backends, device):
        assert backends[-1] == "reference"
        if workload.rule == "adamw":
            raise pipelines.DifferentStep("the two pipelines take different steps")

    monkeypatch.setattr(kernels, "check_same_step", check)
    sweep = swept("--rules", "adamw", "sgd", "--verbs", "update", "--sizes", "10")
    assert sweep.failed and "adamw:float32: not measured: the two" in sweep.notes[1]
    assert timed(sweep) == {("10", "fusedopt_cuda:update:sgd:float32")}


def test_a_size_that_fails_takes_no_other_with_it(cpu_backend, monkeypatch):
    def fails(report, case, workload, shapes, *args):
        if shapes == [(1 << 10,)]:
            raise RuntimeError("out of memory\nadvice")
        gpu_kernels.time_kernels(report, case, workload, shapes, *args)

    monkeypatch.setattr(kernels, "time_kernels", fails)
    sweep = swept()
    assert sweep.failed and "kernel-2^10, sgd:float32: out of memory" in sweep.notes
    assert len(timed(sweep)) == len(verbs.VERBS)


@pytest.mark.parametrize("name", ["megatron_fp16", "deepspeed_fp16"])
def test_fp16_rivals_skip_a_step_with_an_inf(name):
    shapes = all_of_them.tiny()
    grads = param_sets.Gradients(shapes, torch.float16)
    params = param_sets.make_params(shapes, torch.float16)
    pipeline = registry.gpu_kinds(CPU)[name].build(params, grads)
    before = [value.detach().clone() for value in pipeline.updated()]
    pipeline.prepare()
    params[2].grad[5] = float("inf")
    pipeline.step()
    assert all(torch.equal(a, b) for a, b in zip(before, pipeline.updated(), strict=True))


class Event:
    """A CUDA event on a clock that only the calls themselves move."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = Event.now

    def synchronize(self) -> None:
        assert self.time == Event.now  # the last one

    def elapsed_time(self, end: Event) -> float:
        return end.time - self.time


def a_gpu() -> gpu_machine.Machine:
    machine = gpu_machine.Machine.__new__(gpu_machine.Machine)
    machine._scratch, machine._cycles_per_ms = torch.zeros(8, dtype=torch.uint8), 1000.0
    machine.device = torch.device("cpu")
    return machine


def test_events_enclose_a_call_with_the_queue_held_before(monkeypatch):
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    machine = a_gpu()

    def call(ms: float) -> None:
        assert len(held) == 1
        Event.now += ms

    assert machine.event_ms(lambda: call(2.0), 3.0) == 2.0
    assert held == [3000] and machine._scratch.tolist() == [1] * 8
    held.clear()
    machine.event_ms(lambda: call(1.0), 1e9)
    assert held == [int(gpu_machine.MAX_HOLD_MS * 1000)]


def test_a_call_by_itself_is_timed_by_do_bench(monkeypatch):
    asked = []
    testing = ModuleType("triton.testing")
    testing.do_bench = lambda call, return_mode: asked.append(return_mode) or [*range(1000)]
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    times = a_gpu().bench(lambda: None)
    assert asked == ["all"] and times == [*range(0, 1000, 25)]
    monkeypatch.setitem(sys.modules, "triton.testing", None)  # not installed
    machine = a_gpu()
    monkeypatch.setattr(machine, "event_ms", lambda call, hold_ms: 7.0, raising=False)
    assert machine.bench(lambda: None) == [7.0] * gpu_machine.SAMPLES


def test_only_work_on_the_device_counts_as_a_launch():
    events = [
        SimpleNamespace(name=name, device_type=where, is_user_annotation=mark,
                        time_range=SimpleNamespace(start=start))
        for start, name, where, mark in (
            (3, "memset", DeviceType.CUDA, False),
            (1, "kernel", DeviceType.CUDA, False),
            (2, "optimizer", DeviceType.CUDA, True),
            (0, "cudaLaunchKernel", DeviceType.CPU, False),
        )
    ]  # fmt: skip
    assert gpu_machine.launched(events, DeviceType.CUDA) == ["kernel", "memset"]


def test_a_stream_that_no_torch_operation_is_is_a_triton_kernel(monkeypatch):
    called = []
    module = ModuleType("benchmarks.gpu.triton_streams")
    module.step = lambda *arrays: called.append(len(arrays))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gpu_package, "triton_streams", module, raising=False)
    monkeypatch.setattr(gpu_streams, "NUMEL", 8)
    machine, report = without_shim(), row_files.Report({}, None)
    machine.dry = False
    gpu_streams.measure_streams(machine, report)
    assert {row["pipeline"]: row["bytes_per_param"] for row in report.rows} == {
        "copy": "8", "read": "4", "step": "28",
    }  # fmt: skip
    assert called == [4] * 3 and report.ceiling_gb_s  # the first one compiles


NCU = """==PROF== Connected to process 17
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","byte","byte"
"0","17","reduce_kernel(DeviceStep, bool)","4,000","8"
"1","17","void update_kernel<AdamW, 0>(DeviceStep)","16000","12000"
==PROF== Disconnected
"""


def test_counters_are_read_off_the_profilers_csv():
    found = gpu_kernels.parse_counters(NCU, 1000)
    assert list(found.values()) == [4.008, 28.0]
    report = gpu_machine.DeviceReport(without_shim(), None)
    gpu_kernels.add_counters(report, verbs.Workload("adamw"), "cuda", 1000, found)
    assert [row["values"] for row in report.rows] == ["32.008", "0.025"]
    assert gpu_kernels.parse_counters("==ERROR== ERR_NVGPUCTRPERM\n", 1000) == {}
