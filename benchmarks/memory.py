"""Peak memory of the first and the second step: torch.optim against fusedopt.

python -m benchmarks memory            rows go to benchmarks/results/local
python -m benchmarks memory --quick    a small list once, printed only

Every figure comes from a process of its own. They count from the moment when parameters and
gradients are there and the optimizer is not. docs/training.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import benchmarks
import fusedopt
from benchmarks import arguments as args_of, pipelines as pipelines_of
from benchmarks.arguments import device, gpu_name, positive
from benchmarks.measure import available_bytes
from benchmarks.param_sets import LISTS, Gradients, make_params
from benchmarks.pipelines import (
    ADAMW,
    MAX_GRAD_NORM,
    DifferentStep,
    Ours,
    Pipeline,
    TorchOpsMasters,
)
from benchmarks.rivals import torch_adamw
from benchmarks.rows import Report, add_options, destination, provenance, told, wide

# The packages are those that this process has, whatever lies on the path before them.
CHILD = """
import importlib.util, json, sys
for name, file in json.loads(sys.argv[1]).items():
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from benchmarks.memory import Job, measure
print(json.dumps(measure(Job(*json.loads(sys.argv[2])))))
"""
PACKAGES = {"fusedopt": fusedopt.__file__, "benchmarks": benchmarks.__file__}
CHECKED_WITH = "torch_fused"  # by all pipelines, also where nothing else of torch's is measured
MIB = 2**20
BYTES_PER_PARAM_AT_PEAK = 40  # fp32: param, gradient and its source, two states, foreach's copies
STEPS = ("first", "second")
COLUMNS = ["state_mib"] + [
    f"{step}_{figure}_mib" for step in STEPS for figure in ("peak", "beyond_state", "added")
]
INIT_STATE = "fusedopt_init_state"  # opt.init_state() before the first step
PIPELINES = ("torch_foreach", "torch_fused", "fusedopt", INIT_STATE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_LIST = "gpt-1M"


# ---- in a process of its own ---------------------------------------------------------------------


class Job(NamedTuple):
    """One measurement, in values that JSON can carry."""

    params: str
    dtype: str
    pipeline: str
    device: str
    threads: int


class Meter(NamedTuple):
    name: str
    exact: bool  # no: a lower bound
    now: Callable[[], int]
    reset_peak: Callable[[], object]
    peak: Callable[[], int]


def _status(field: str) -> int:
    """Of what Linux counts as resident."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


def _reset_resident() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _largest_ever() -> int:
    """The peak since the process began, which cannot be reset: misses what an older peak hides."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def meters(device: torch.device) -> list[Meter]:
    """On a GPU what torch's allocator has given to tensors, and what it holds of the GPU: what
    nvidia-smi shows, and runs out."""
    if device.type == "cuda":
        cuda = torch.cuda
        reset = cuda.reset_peak_memory_stats
        return [
            Meter("allocated", True, cuda.memory_allocated, reset, cuda.max_memory_allocated),
            Meter("reserved", True, cuda.memory_reserved, reset, cuda.max_memory_reserved),
        ]
    try:
        _reset_resident()
        _status("VmHWM")
    except (OSError, StopIteration):
        return [Meter("resident", False, _largest_ever, lambda: None, _largest_ever)]
    now, peak = (lambda field=field: _status(field) for field in ("VmRSS", "VmHWM"))
    return [Meter("resident", True, now, _reset_resident, peak)]


def build(job: Job, params: list[Tensor], grads: Gradients) -> Pipeline:
    if job.pipeline.startswith("fusedopt"):
        ours: Callable[[list[Tensor]], Any] = lambda p: fusedopt.FusedAdamW(  # noqa: E731
            p, max_grad_norm=MAX_GRAD_NORM, **ADAMW
        )
        pipeline = Ours(params, grads, ours, fusedopt.GradScaler)
        if job.pipeline == INIT_STATE:
            pipeline.optimizer.init_state()
        return pipeline
    make = torch_adamw(**{job.pipeline.removeprefix("torch_"): True})
    kind = Pipeline if params[0].dtype == torch.float32 else TorchOpsMasters
    return kind(params, grads, make)


def start(job: Job, name: str) -> tuple[list[Tensor], Gradients]:
    """Parameters of the list ``name``, with gradients as backward() leaves them."""
    shapes, dtype = LISTS[name](), DTYPES[job.dtype]
    params = make_params(shapes, dtype, job.device)
    grads = Gradients(shapes, dtype, device=job.device)
    grads.backward(params)
    return params, grads


def check_same_step(dtype: str, pipelines: Sequence[str], device: torch.device) -> None:
    """Hold the pipelines to one step of a small list; raises DifferentStep."""
    jobs = [Job(WARM_UP_LIST, dtype, name, str(device), 1) for name in pipelines]
    built = [build(job, *start(job, WARM_UP_LIST)) for job in jobs]
    for pipeline in built:
        pipelines_of.take_checked_steps(pipeline, pipeline._grads)
    params = [param.detach() for param in start(jobs[0], WARM_UP_LIST)[0]]
    for other in built[1:]:
        pipelines_of.compare_steps(params, built[0], other)


def warm_up(job: Job) -> None:
    """Two steps on a small list, so that code, threads and lazy imports are in memory already."""
    pipeline = build(job, *start(job, WARM_UP_LIST))
    pipeline.step()
    pipeline.prepare()
    pipeline.step()


def release_unused(device: torch.device) -> None:
    """Give back what allocators keep for later, so that every peak is of memory in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def measure(job: Job) -> dict[str, Any]:
    """Bytes of parameters, gradients and state; and by meter the peaks: above what there was before
    the optimizer, and `added` above what there was just before the step."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    own = meters(device)
    warm_up(job)
    params, grads = start(job, job.params)
    release_unused(device)
    before = [meter.now() for meter in own]
    own[0].reset_peak()
    pipeline = build(job, params, grads)
    built = [meter.peak() for meter in own]
    first_start, first = _step(pipeline, own)
    states = state_bytes(pipeline)
    pipeline.prepare()
    release_unused(device)
    second_start, second = _step(pipeline, own)
    return {
        "param_bytes": sum(param.nbytes for param in params),
        "state_bytes": states,
        "backend": pipeline.backend() if isinstance(pipeline, Ours) else "",
        "exact": all(meter.exact for meter in own),
        "peaks": {
            meter.name: {
                "first_peak": max(built[i], first[i]) - before[i],
                "first_added": first[i] - first_start[i],
                "second_peak": second[i] - before[i],
                "second_added": second[i] - second_start[i],
            }
            for i, meter in enumerate(own)
        },
    }


def _step(pipeline: Pipeline, own: Sequence[Meter]) -> tuple[list[int], list[int]]:
    start_bytes = [meter.now() for meter in own]
    own[0].reset_peak()
    pipeline.step()
    return start_bytes, [meter.peak() for meter in own]


def state_bytes(pipeline: Pipeline) -> int:
    """What has to stay from step to step: the optimizer's state and the masters."""
    states = pipeline.optimizer.state.values()
    kept = [value for own in states for value in own.values() if isinstance(value, Tensor)]
    if isinstance(pipeline, TorchOpsMasters):
        kept += pipeline.masters
    return sum(tensor.nbytes for tensor in kept)


# ---- the command ---------------------------------------------------------------------------------


class NotMeasured(Exception):
    """Why there is no figure."""


def run_child(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, json.dumps(PACKAGES), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return measured
    if done.returncode < 0:
        raise NotMeasured(f"the process was ended by signal {-done.returncode}: out of memory?")
    raise NotMeasured((done.stderr.strip().splitlines() or ["no message"])[-1])


def processes_at_a_time(params: str, device: torch.device) -> int:
    """Peaks do not depend on what else runs, as long as everything fits."""
    if device.type == "cuda":
        return 1
    need = BYTES_PER_PARAM_AT_PEAK * sum(math.prod(shape) for shape in LISTS[params]())
    fit = available_bytes() // need
    if fit < 1:
        raise NotMeasured(f"needs {need / 2**30:.1f} GiB of free memory")
    return min(fit, os.cpu_count() or 1)


def measure_case(params: str, dtype: str, args: argparse.Namespace, bar: tqdm[Any]) -> Any:
    """By pipeline what its processes have measured."""

    def take(pipeline: str) -> dict[str, Any]:
        job = Job(params, dtype, pipeline, str(args.device), args.threads)
        measured = run_child(job)
        if measured["backend"] == "reference":
            raise NotMeasured("fusedopt has only its reference backend here: python -m fusedopt")
        bar.update()
        return measured

    check_same_step(dtype, [*dict.fromkeys([CHECKED_WITH, *args.pipelines])], args.device)
    jobs = [pipeline for _ in range(args.runs) for pipeline in args.pipelines]
    with ThreadPoolExecutor(processes_at_a_time(params, args.device)) as executor:
        results = list(executor.map(take, jobs))
    return {
        name: [result for job, result in zip(jobs, results, strict=True) if job == name]
        for name in args.pipelines
    }


def add_figures(
    report: Report, case: str, pipeline: str, measured: Sequence[dict[str, Any]]
) -> None:
    note = f"params {measured[0]['param_bytes'] / MIB:.1f} MiB"
    if measured[0]["backend"]:
        note += f"; backend {measured[0]['backend']}"
    if not measured[0]["exact"]:
        note += "; lower bounds, since the peak cannot be reset here"

    def add(figure: str, values: Sequence[float], note: str) -> None:
        report.add(figure, "MiB", values, case=case, pipeline=pipeline, note=note)

    state = [one["state_bytes"] / MIB for one in measured]
    add("state_mib", state, note)
    for index, meter in enumerate(measured[0]["peaks"]):
        for step in STEPS:
            name = step if index == 0 else f"{meter}_{step}"
            peak = [one["peaks"][meter][f"{step}_peak"] / MIB for one in measured]
            added = [one["peaks"][meter][f"{step}_added"] / MIB for one in measured]
            beyond = [whole - part for whole, part in zip(peak, state, strict=True)]
            add(f"{name}_peak_mib", peak, f"{note}; {meter}")
            add(f"{name}_beyond_state_mib", beyond, f"{note}; {meter}")
            add(f"{name}_added_mib", added, f"{note}; {meter}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = args_of.parser("memory", __doc__)
    add = parser.add_argument
    add("--device", type=device, default=torch.device("cpu"))
    add("--params", nargs="+", choices=LISTS, metavar="LIST", help=", ".join(LISTS))
    add("--dtypes", nargs="+", choices=DTYPES, help="half with fp32 masters")
    add("--pipelines", nargs="+", choices=PIPELINES, default=PIPELINES)
    add("--runs", type=positive, help="processes for each figure (default: 3)")
    add("--threads", type=positive, default=1, help="of each process (default: 1)")
    add_options(parser, "default to a small list, once")
    args = parser.parse_args(arguments)
    args.params = args.params or ["gpt-10M" if args.quick else "gpt2-124M"]
    args.dtypes = args.dtypes or (["fp32"] if args.quick else ["fp32", "bf16"])
    args.runs = args.runs or (1 if args.quick else 3)
    args.out = destination(args, gpu_name(args.device))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    report = Report(provenance(gpu_name(args.device)), args.out)
    cases = [(params, dtype) for params in args.params for dtype in args.dtypes]
    problems = {}
    with tqdm(total=len(cases) * args.runs * len(args.pipelines), unit="process") as bar:
        for params, dtype in cases:
            case = f"{params}-{dtype}"
            bar.set_description(case)
            try:
                by_pipeline = measure_case(params, dtype, args, bar)
            except (NotMeasured, DifferentStep) as error:
                problems[case] = error
                continue
            for pipeline, measured in by_pipeline.items():
                add_figures(report, case, pipeline, measured)
    print(wide(report.figures(), COLUMNS))
    if args.device.type == "cuda":
        print()
        print(wide(report.figures(), [f"reserved_{name}" for name in COLUMNS[1:]]))
    for case, error in problems.items():
        print(f"{case} not measured: {error}")
    print(f"\n{told(args.out)}")
    return int(bool(problems))
