"""The GPU benchmark, as far as it goes without a GPU. No test asserts a time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bench_helpers import ROOT, read
from torch.autograd import DeviceType

from benchmarks import (
    cases as all_of_them,
    clocks,
    goals,
    gpu as gpu_package,
    host_time,
    kernels,
    measure,
    param_sets,
    pipelines,
    registry,
    rivals,
    rows as row_files,
    verbs,
)
from benchmarks.gpu import (
    first_step as gpu_first_step,
    kernels as gpu_kernels,
    machine as gpu_machine,
    sanitize as gpu_sanitize,
    step as gpu_step,
    streams as gpu_streams,
)
from fusedopt.backends import triton

CPU = {"cuda": "cpu", "triton": "cpu"}
DRY_CASES = ["adamw-1M", "adamw-llama-1.24B", "fp16-llama-1.24B", "sgd-resnet50",
             "bf16-gpt2-124M", "adamw-gpt2-bucket"]  # fmt: skip
CASES = all_of_them.gpu_cases()


def numel(shapes: list[param_sets.Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("shapes", "total", "tensors"),
    [
        (param_sets.resnet50(), 25_557_032, 161),
        (param_sets.gpt2(), 124_439_808, 148),
        (param_sets.llama_3_2_1b(), 1_235_814_400, 146),
    ],
    ids=["resnet50", "gpt2", "llama"],
)
def test_models_have_their_published_sizes(shapes, total, tensors):
    assert (numel(shapes), len(shapes)) == (total, tensors)


def test_ragged_list_and_small_models():
    ragged = param_sets.ragged()
    assert len(ragged) == 2000 and ragged == param_sets.ragged()
    assert 1 <= min(ragged)[0] < 10 and 4990 < max(ragged)[0] <= 5000
    small = CASES["adamw-1M"].shapes()
    assert numel(small) == 1_000_000 and len(small) >= 150
    assert len(CASES["adamw-300x1k"].shapes()) == 300


def test_every_case_is_complete():
    kinds = registry.gpu_kinds(CPU)
    for case in CASES.values():
        assert case.pipelines[0].startswith("fusedopt_")
        assert set(case.pipelines) <= set(kinds)
        assert {c.pipeline for c in case.comparisons} == {case.pipelines[0]}
    assert {*gpu_step.KERNELS, *all_of_them.QUICK_GPU_CASES} <= set(CASES)
    assert CASES["adamw-gpt2-bucket"].grads == "bucket"


def test_every_goal_asks_for_what_is_measured():
    for goal in goals.ON_GPU:
        _, _, kernel = goal.pipeline.partition(":")
        if goal.case == goals.FIRST_STEP:
            assert kernel in gpu_first_step.SAMPLES and goal.figure == "wall"
        elif goal.figure == "dram_deviation":
            assert kernel == str(gpu_step.ADAMW)
        elif kernel:
            assert kernel in {gpu_step.KERNELS[goal.case].kernel(verb) for verb in verbs.VERBS}
        else:
            assert {goal.pipeline, *filter(None, [goal.reference])} <= {*CASES[goal.case].pipelines}
            assert goal.figure in clocks.EventClock.units


def test_predictions_follow_the_bytes():
    kinds, case = registry.gpu_kinds(CPU), CASES["adamw-llama-1.24B"]
    predicted = {
        name: goals.predicted_ms(name, kinds[name].bytes_per_param, case)[0]
        for name in case.pipelines
    }
    assert 9.2 < predicted["fusedopt_adamw"] < 10.1  # 32 B at 4.3 TB/s are 9.20 ms
    assert 17 < predicted["adamw_fused"] < 18


def test_documentation_names_every_case_and_figure():
    text = (ROOT / "docs" / "gpu_benchmark.md").read_text()
    named = [*CASES, *clocks.EventClock.units, "launches", "dram_bytes_per_param"]
    assert [name for name in named if f"`{name}`" not in text] == []


# ---- dry runs ------------------------------------------------------------------------------------


def run_in(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a dry run may install the shim as the CUDA backend's driver."""
    program = (
        "import fusedopt, sys; sys.path.append(sys.argv.pop(1)); "
        "from importlib import import_module as get; "
        f"sys.exit(get('benchmarks.{module}').main())"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("dry-run")
    options = ["--dry-run", "--goals", "--out", "rows.csv"]
    done = run_in(folder, "gpu.step", *options, "--cases", *DRY_CASES)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    return done.stdout, read(folder / "rows.csv")


def test_dry_run_has_well_formed_rows(cpu_backend, dry_run):
    output, rows = dry_run
    by_name = {(r["case"].removeprefix("dry-run:"), r["pipeline"], r["reference"], r["figure"]): r
               for r in rows}  # fmt: skip
    assert len(by_name) == len(rows)
    absent = set(registry.unavailable(registry.gpu_kinds(CPU)))
    for name in DRY_CASES:
        ours, *rivals = CASES[name].pipelines
        for rival in rivals:
            for figure, unit in clocks.EventClock.units.items():
                row = by_name.pop((name, ours, rival, figure), None)
                if row is None:
                    assert absent and f"{name}: {rival} not measured" in output
                    continue
                assert row["unit"] == unit and "predicted fusedopt" in row["note"]
                assert all(float(row[c]) > 0 for c in ("bytes_per_param", "reference_bytes",
                                                       "ceiling_gb_s", "params"))  # fmt: skip
        for pipeline in CASES[name].pipelines:
            launches = by_name.pop((name, pipeline, "", "launches"), {"values": "1"})
            assert int(launches["values"]) > 0
    backends = ("cuda", "triton")
    wanted = {
        (case, f"fusedopt_{backend}:{kernel}", "", "gpu")
        for case, dtype in (("adamw-llama-1.24B", "float32"), ("fp16-llama-1.24B", "float16"))
        for kernel in (f"reduce:{dtype}", f"update:adamw:{dtype}")
        for backend in backends
    }
    wanted |= {
        ("adamw-400M", f"fusedopt_{backend}:adamw:float32", "", figure)
        for backend in backends
        for figure in ("dram_bytes_per_param", "dram_deviation")
    }
    wanted |= {("first-step", f"fusedopt_adamw_triton:{cache}", "", "wall")
               for cache in ("empty", "filled")}  # fmt: skip
    wanted |= {("bandwidth", name, "", "gpu") for name in ("copy", "read", "step")}
    assert set(by_name) == wanted


def test_nothing_in_a_dry_run_looks_like_a_measurement(cpu_backend, dry_run):
    output, rows = dry_run
    assert all(row["machine"] == gpu_machine.DRY_RUN for row in rows)
    assert all(row["note"].startswith(gpu_machine.DRY_RUN) for row in rows)
    assert all(row["case"].startswith("dry-run:") for row in rows)
    assert output.count("DRY RUN, a tiny list") == len(DRY_CASES)
    assert output.count("| DRY RUN | open |") == len(goals.ON_GPU)
    assert "MISSED |" not in output and "| met |" not in output and goals.SAY in output


@pytest.mark.parametrize(
    ("command", "options"), [(gpu_step, []), (kernels, ["--backends", "cuda", "triton"])]
)
def test_dry_run_refuses_the_folder_of_results(command, options, capsys):
    out = ROOT / "benchmarks" / "results" / "nvidia-h200.csv"
    with pytest.raises(SystemExit):
        command.parse([*options, "--dry-run", "--out", str(out)])
    assert "measures nothing" in capsys.readouterr().err


def test_dry_sweep_of_the_kernels_has_rows_and_no_figures(cpu_backend, tmp_path):
    options = ["--backends", "cuda", "triton", "--dry-run", "--sizes", "10:12"]
    options += ["--rules", "adamw", "sgd", "--dtypes", "bfloat16"]
    done = run_in(tmp_path, "kernels", *options, "--out", "rows.csv")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    rows = read(tmp_path / "rows.csv")
    assert all(row["machine"] == gpu_machine.DRY_RUN for row in rows)
    assert all(row["note"].startswith(gpu_machine.DRY_RUN) for row in rows)
    assert "GB/s" not in done.stdout and done.stdout.count("DRY RUN, no figures") == 1
    timed = {(r["case"], r["pipeline"]): r for r in rows if "bandwidth" not in r["case"]}
    # Reducing bf16 gradients is the same for both rules: measured once.
    kernels_of = {"reduce:bfloat16": 2, "update:adamw:bfloat16": 30, "update:sgd:bfloat16": 14}
    assert set(timed) == {
        (f"dry-run:kernel-2^{k}", f"fusedopt_{backend}:{kernel}")
        for k in (10, 12)
        for backend in ("cuda", "triton")
        for kernel in kernels_of
    }
    for (case, pipeline), row in timed.items():
        assert int(row["params"]) == 2 ** int(case[-2:])
        assert float(row["bytes_per_param"]) == kernels_of[pipeline.partition(":")[2]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu_step.main([])
    with pytest.raises(SystemExit, match="--dry-run"):
        kernels.main(["--backends", "cuda"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sanitized_program_takes_the_steps_of_the_cpu(backend, cpu_backend, tmp_path):
    done = run_in(tmp_path, "gpu.sanitize", backend, "--dry-run")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    assert done.stdout.count("same bits as the CPU backend") == len(gpu_sanitize.CASES)


@pytest.fixture
def uploads(monkeypatch):
    """Tables that were copied to the device."""
    seen = []
    run = triton._Upload.run
    monkeypatch.setattr(triton._Upload, "run", lambda self, c: seen.append(c) or run(self, c))
    monkeypatch.setattr(triton.driver, "made", host_time.NoLaunches())
    return seen


@pytest.mark.parametrize(("moved", "tables"), [("nothing", 0), ("lr", 3)])
def test_host_time_is_that_of_steps_that_launch_nothing(cpu_backend, uploads, moved, tables):
    pipeline = host_time.HostOnly(moved)
    before = [param.detach().clone() for param in pipeline.params]
    for _ in range(2):
        pipeline.prepare()
        pipeline.step()
    assert pipeline.backend() == "triton" and 1 <= len(uploads) <= 2
    uploads.clear()
    for _ in range(3):
        pipeline.prepare()
        pipeline.step()
    assert len(uploads) == tables
    assert all(torch.equal(a, b) for a, b in zip(before, pipeline.params, strict=True))


def test_host_time_writes_rows_only_where_it_is_told_to(cpu_backend, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    host_time.main(["--quick", "--rounds", "1", "--out", str(out)])
    assert triton.driver.made is None or type(triton.driver.made) is not host_time.NoLaunches
    rows = read(out)
    assert {row["note"].split(";")[0] for row in rows} == {"moved: gradients", "moved: lr"}
    for row in rows:
        assert row["case"] == "host-300x1k" and int(row["tensors"]) == 300
        still = f"{host_time.PIPELINE}:nothing"
        assert (row["reference"], row["figure"], row["unit"]) == (still, "host", "us")
    assert capsys.readouterr().out.count("\n") == 3 + len(rows)


def test_script_is_well_formed_bash():
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "--dry-run" in done.stdout and "--record" in done.stdout
    command = ["bash", str(script), "--record", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "measures nothing" in done.stderr


# ---- how it measures -----------------------------------------------------------------------------


class Wrong(pipelines.Pipeline):
    def step(self) -> None:
        self.scaler.step(self.optimizer)  # not clipped
        self.scaler.update()


def without_shim() -> gpu_machine.DryRun:
    """A DryRun that leaves the CUDA backend of this process as it is."""
    machine = gpu_machine.DryRun.__new__(gpu_machine.DryRun)
    machine._shim = machine._interpreter = None
    machine.backends = dict(CPU)
    return machine


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


def test_with_little_memory_two_pipelines_are_there_at_a_time():
    case = CASES["adamw-llama-1.24B"]
    (everything,) = measure.groups(case, 200 << 30)
    assert everything == (case.pipelines[0], [*case.comparisons])
    assert [len(group) for _, group in measure.groups(case, 1 << 30)] == [1] * 4


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


def test_streams_that_no_torch_operation_is_are_triton_kernels(monkeypatch):
    called = []
    kernels = ModuleType("benchmarks.gpu.triton_streams")
    kernels.step = lambda *arrays: called.append(len(arrays))
    kernels.read = lambda *arrays: called.append(len(arrays))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(gpu_package, "triton_streams", kernels, raising=False)
    found, note = gpu_streams._streams([torch.zeros(8)] * 4, dry=False)
    assert list(found) == ["copy", "read", "step", "read_triton"] and note == ""
    called.clear()
    assert [found[name][0] for name in found] == [8, 4, 28, 4]
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
    report = gpu_machine.DeviceReport(without_shim(), None)
    gpu_kernels.add_counters(report, verbs.Workload("adamw"), "cuda", 1000, found)
    assert [row["values"] for row in report.rows] == ["32.008", "0.025"]
    assert gpu_kernels.parse_counters("==ERROR== ERR_NVGPUCTRPERM\n", 1000) == {}
