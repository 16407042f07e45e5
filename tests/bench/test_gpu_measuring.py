"""How the GPU benchmark measures: what it refuses to time, its clocks and its counters."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fusedopt  # the installed one, before the checkout is on the path  # noqa: F401

pytest.importorskip("numpy")
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import gpu as gpu_package, param_sets, pipelines, registry, verbs
from benchmarks.gpu import (
    cases as gpu_cases,
    first_step as gpu_first_step,
    kernels as gpu_kernels,
    machine as gpu_machine,
    measure as gpu_measure,
    report as gpu_report,
    streams as gpu_streams,
    sweep as gpu_sweep,
    targets as gpu_targets,
)
from fusedopt.backends import triton

CPU = {"cuda": "cpu", "triton": "cpu"}


class Wrong(pipelines.Pipeline):
    def step(self) -> None:
        self.scaler.step(self.optimizer)  # not clipped
        self.scaler.update()


def kinds_with(kind: pipelines.Kind) -> dict[str, pipelines.Kind]:
    return registry.gpu_kinds(CPU) | {"adamw_fused": kind}


def without_shim() -> gpu_machine.DryRun:
    """A DryRun that leaves the CUDA backend of this process as it is."""
    machine = gpu_machine.DryRun.__new__(gpu_machine.DryRun)
    machine._shim = machine._interpreter = None
    machine.backends = CPU
    return machine


def measured(kind: pipelines.Kind, **changes: float) -> dict[str, gpu_measure.Measured]:
    case = gpu_cases.gpu_cases()["adamw-10M"].shrunk()
    machine = without_shim()
    if "free_bytes" in changes:
        machine.free_bytes = lambda: int(changes["free_bytes"])
    items = gpu_measure.measure_case(case, kinds_with(kind), machine, 3, lambda: 1.0, False)
    return {item.pipeline: item for item in items}


def fused(make: type[pipelines.Pipeline]) -> pipelines.Kind:
    adamw = pipelines.torch_adamw(fused=True)
    return pipelines.Kind("fused", 48, lambda p, g: make(p, g, adamw))


def test_another_step_is_not_timed(cpu_backend):
    items = measured(fused(Wrong))
    assert items["adamw_fused"].wrong and not items["adamw_fused"].samples
    assert "different steps" in items["adamw_fused"].note
    assert len(items["adamw_foreach"].samples) == len(items["fusedopt_adamw"].samples) == 3


def test_a_pipeline_that_fails_takes_no_other_with_it(cpu_backend):
    def fail(params: object, grads: object) -> pipelines.Pipeline:
        raise OSError("libsomething.so: not found")

    items = measured(pipelines.Kind("fails", 1, fail))
    assert items["adamw_fused"].note == "OSError: libsomething.so: not found"
    assert not items["adamw_fused"].wrong
    assert len(items["adamw_foreach"].samples) == 3


def test_without_triton_its_pipelines_are_named_and_not_timed(cpu_backend, monkeypatch):
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton is not installed")
    machine, kinds = without_shim(), registry.gpu_kinds({"cuda": "cpu", "triton": "triton"})
    case = gpu_cases.gpu_cases()["sgd-resnet50"].shrunk()
    measured = gpu_measure.measure_case(case, kinds, machine, 1, lambda: 1.0, False)
    items = {item.pipeline: item for item in measured}
    absent = items["fusedopt_sgd_triton"]
    assert absent.note == "Triton is not installed" and not absent.wrong and not absent.samples
    assert len(items["sgd_fused"].samples) == 1
    machine.backends = {"cuda": "cpu", "triton": "triton"}
    assert gpu_machine.no_triton(machine) == "Triton is not installed"


def test_a_first_step_that_fails_says_why(monkeypatch):
    def failed(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no compiler\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match="the first step failed: RuntimeError: no compiler"):
        gpu_first_step.measure_first_steps(without_shim())


def test_kernels_of_all_backends_are_timed_in_turns(cpu_backend, monkeypatch):
    machine, order = without_shim(), []

    class Timed(gpu_kernels.Verbs):
        def update(self) -> None:
            order.append(self)
            super().update()

    monkeypatch.setattr(gpu_kernels, "Verbs", Timed)
    backends, adamw = ["cuda", "triton"], verbs.Workload("adamw")
    times = gpu_kernels.time_kernels(adamw, gpu_cases.tiny(), machine, backends)
    turns = [order.index(own) for own in order]
    assert turns == [0, 1] * 4  # one to warm up, two rounds, the launches
    pipelines = [time.pipeline("update") for time in times]
    assert pipelines == [f"fusedopt_{backend}:update:adamw:float32" for backend in backends]
    assert all(t.numel == 4262 and t.ms["update"].p50 > 0 for t in times)


def swept(machine: gpu_machine.DryRun, budget_s: float = 60.0) -> gpu_sweep.Sweep:
    sweep = gpu_sweep.Sweep(machine, ["cuda", "triton"], budget_s, None)
    sweep.all([(verbs.Workload("sgd"), verbs.VERBS)], [10, 12], lambda: None)
    return sweep


def test_a_sweep_names_what_it_leaves_out(cpu_backend, monkeypatch):
    machine = without_shim()
    assert not swept(machine).failed
    assert swept(machine, budget_s=-1.0).notes[1:] == [
        f"kernel-2^{k}, sgd:float32: not measured, no time left" for k in (10, 12)
    ]
    per_param = gpu_sweep.BYTES_OF_TEMPORARIES + 8  # one backend: param and gradient
    monkeypatch.setattr(machine, "free_bytes", lambda: per_param << 11)
    sweep = swept(machine)
    assert sweep.notes == [
        "triton: not measured: the CPU backend stands in for it",
        "kernel-2^12, sgd:float32: needs 0.0 GiB more than are free",
    ]
    cases = {(row["case"], row["pipeline"]) for row in sweep.report.rows}
    kernels = {pair for pair in cases if "kernel" in pair[0]}
    assert kernels == {
        ("dry-run:kernel-2^10", "fusedopt_cuda:reduce:float32"),
        ("dry-run:kernel-2^10", "fusedopt_cuda:update:sgd:float32"),
    }


def test_a_backend_with_another_step_is_not_swept(cpu_backend, monkeypatch):
    def check(workload, backends, device):
        assert backends[-1] == "reference"
        if workload.rule == "adamw":
            raise pipelines.DifferentStep("the two pipelines take different steps")

    monkeypatch.setattr(gpu_sweep, "check_same_step", check)
    sweep = gpu_sweep.Sweep(without_shim(), ["cuda"], 60.0, None)
    workloads = [(verbs.Workload(rule), ["update"]) for rule in ("adamw", "sgd")]
    sweep.all(workloads, [10], lambda: None)
    assert sweep.failed and "adamw:float32: not measured: the two" in sweep.notes[0]
    timed = [row["pipeline"] for row in sweep.report.rows if "kernel" in row["case"]]
    assert timed == ["fusedopt_cuda:update:sgd:float32"]


def test_a_size_that_fails_takes_no_other_with_it(cpu_backend, monkeypatch):
    def fails(workload, shapes, *args, **options):
        if shapes == [(1 << 10,)]:
            raise RuntimeError("out of memory\nadvice")
        return gpu_kernels.time_kernels(workload, shapes, *args, **options)

    monkeypatch.setattr(gpu_sweep, "time_kernels", fails)
    sweep = swept(without_shim())
    assert sweep.failed and "kernel-2^10, sgd:float32: out of memory" in sweep.notes
    timed = [row for row in sweep.report.rows if row["case"] == "dry-run:kernel-2^12"]
    assert len(timed) == len(verbs.VERBS)


def test_with_little_memory_two_pipelines_are_there_at_a_time(cpu_backend):
    case = gpu_cases.gpu_cases()["adamw-llama-1.24B"]
    everything = [case.pipelines]
    assert list(gpu_measure._groups(case, 139 << 30)) == everything
    pairs = [[case.ours, rival] for rival in case.pipelines[1:]]
    assert list(gpu_measure._groups(case, 1 << 30)) == pairs
    items = measured(fused(pipelines.Pipeline), free_bytes=1)
    assert [len(item.samples) for item in items.values()] == [3] * 5
    assert all(item.ratio("gpu_ms").p50 > 0 for item in items.values())


@pytest.mark.parametrize("name", ["megatron_fp16", "deepspeed_fp16"])
def test_fp16_rivals_skip_a_step_with_an_inf(name):
    shapes = gpu_cases.tiny()
    grads = param_sets.Gradients(shapes, torch.float16)
    params = param_sets.make_params(shapes, torch.float16)
    pipeline = registry.gpu_kinds(CPU)[name].build(params, grads)
    before = [value.detach().clone() for value in pipeline.updated()]
    pipeline.prepare()
    params[2].grad[5] = float("inf")
    pipeline.step()
    assert all(torch.equal(a, b) for a, b in zip(before, pipeline.updated(), strict=True))


def test_bucket_gradients_are_kept_views_off_alignment():
    shapes = [(64, 4), (8,), (16,)]
    grads = param_sets.Gradients(shapes, torch.float32, "bucket")
    params = param_sets.make_params(shapes, torch.float32)
    grads.backward(params)
    first = [param.grad for param in params]
    assert all(grad.data_ptr() % 16 == 4 for grad in first)
    assert len({grad.untyped_storage().data_ptr() for grad in first}) == 1
    values = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    grads.backward(params)
    assert all(param.grad is grad for param, grad in zip(params, first, strict=True))
    torch.testing.assert_close([param.grad for param in params], values, rtol=0, atol=0)


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


def test_events_enclose_each_call_with_the_queue_held_before(monkeypatch):
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    machine = gpu_machine.Cuda.__new__(gpu_machine.Cuda)
    machine._scratch, machine._cycles_per_ms = torch.zeros(8, dtype=torch.uint8), 1000.0

    def call(ms: float) -> None:
        assert len(held) == 1
        Event.now += ms

    assert machine.event_ms([lambda: call(2.0), lambda: call(5.0)], 3.0) == [2.0, 5.0]
    assert held == [3000] and machine._scratch.tolist() == [1] * 8
    held.clear()
    machine.event_ms([lambda: call(1.0)], 1e9)
    assert held == [int(gpu_machine.MAX_HOLD_MS * 1000)]


def test_only_work_on_the_device_counts_as_a_launch(monkeypatch):
    names = ["kernel", "cuda_runtime", "gpu_user_annotation", "gpu_memset", "cpu_op", "gpu_memcpy"]
    events = [{"name": name, "cat": name} for name in names] + [{"name": "process_name"}]
    monkeypatch.setattr(gpu_machine, "_trace", lambda *_: events)
    machine = gpu_machine.Cuda.__new__(gpu_machine.Cuda)
    machine.device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert machine.launches(lambda: None) == ["kernel", "gpu_memset", "gpu_memcpy"]


def test_streams_that_no_torch_operation_is_are_triton_kernels(monkeypatch):
    called = []
    kernels = types.ModuleType("benchmarks.gpu.triton_streams")
    kernels.step = lambda *arrays: called.append(len(arrays))
    kernels.read = lambda *arrays: called.append(len(arrays))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(gpu_package, "triton_streams", kernels, raising=False)
    found, note = gpu_streams._streams([torch.zeros(8)] * 4, dry=False)
    assert list(found) == ["copy", "read", "step", "read_triton"] and note == ""
    called.clear()
    assert [found[name][0] for name in found] == [64, 32, 224, 32]
    found["step"][1]()
    found["read_triton"][1]()
    assert called == [4, 1]


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
    report = gpu_report.Report(without_shim())
    (row,) = report.counters("adamw-400M", 1000, verbs.Workload("adamw"), "cuda", found)
    assert (row["bytes_per_param"], row["dram_bytes_per_param"]) == (32, "32.008")
    off = [target for target in gpu_targets.TARGETS if "counters" in target.label]
    assert off[0].figure(report.lookup) == pytest.approx(0.025)
    assert gpu_kernels.parse_counters("==ERROR== ERR_NVGPUCTRPERM\n", 1000) == {}
