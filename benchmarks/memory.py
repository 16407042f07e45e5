"""Peak memory of the first and the second step: torch.optim against fusedopt.

python -m benchmarks memory            rows go to benchmarks/results/local
python -m benchmarks memory --quick    a small list once, printed only

Every figure comes from a process of its own. They count from the moment when parameters and
gradients are there and the optimizer is not. docs/training.md tells what the figures mean.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import fusedopt
from benchmarks import pipelines as pipelines_of, rows
from benchmarks.measure import available_bytes
from benchmarks.param_sets import LISTS, Gradients, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, DifferentStep, Pipeline, TorchOpsMasters
from benchmarks.rivals import torch_adamw

CHECKED_WITH = "torch_fused"  # by all pipelines, also where nothing else of torch's is measured
MIB = 2**20
BYTES_PER_PARAM_AT_PEAK = 40  # fp32: param, gradient and its source, two states, foreach's copies
COLUMNS = ["state_mib"] + [
    f"{step}_{figure}_mib"
    for step in ("first", "second")
    for figure in ("peak", "beyond_state", "added")
]
INIT_STATE = "fusedopt_init_state"  # opt.init_state() before the first step
PIPELINES = ("torch_foreach", "torch_fused", "fusedopt", INIT_STATE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_LIST = "gpt-1M"


class NotMeasured(Exception):
    """Why there is no figure."""


# ---- in a process of its own ---------------------------------------------------------------------


class Job(NamedTuple):
    """One measurement."""

    params: str
    dtype: str
    pipeline: str
    device: torch.device
    threads: int

    def start(self) -> Pipeline:
        """The pipeline, with gradients as backward() leaves them."""
        return build(self.pipeline, *_start(self))


class Meter(NamedTuple):
    name: str
    now: Callable[[], int]
    reset_peak: Callable[[], object]
    peak: Callable[[], int]


def _resident(field: str) -> int:
    """Of what Linux counts as resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


def meters(device: torch.device) -> list[Meter]:
    """On a GPU what torch's allocator has given to tensors, and what it holds of the GPU: what
    nvidia-smi shows, and runs out."""
    if device.type == "cuda":
        cuda, reset = torch.cuda, torch.cuda.reset_peak_memory_stats
        return [
            Meter("allocated", cuda.memory_allocated, reset, cuda.max_memory_allocated),
            Meter("reserved", cuda.memory_reserved, reset, cuda.max_memory_reserved),
        ]
    now, peak = (lambda field=field: _resident(field) for field in ("VmRSS", "VmHWM"))
    return [Meter("resident", now, lambda: Path("/proc/self/clear_refs").write_text("5"), peak)]


def _start(job: Job) -> tuple[list[Tensor], Gradients]:
    shapes, dtype = LISTS[job.params](), DTYPES[job.dtype]
    params = make_params(shapes, dtype, job.device)
    grads = Gradients(shapes, dtype, device=job.device)
    grads.backward(params)
    return params, grads


def build(name: str, params: list[Tensor], grads: Gradients) -> Pipeline:
    if name.startswith("fusedopt"):
        ours = lambda p: fusedopt.FusedAdamW(p, max_grad_norm=MAX_GRAD_NORM, **ADAMW)  # noqa: E731
        pipeline = pipelines_of.Ours(params, grads, ours, fusedopt.GradScaler)
        if name == INIT_STATE:
            pipeline.optimizer.init_state()
        return pipeline
    make = torch_adamw(**{name.removeprefix("torch_"): True})
    kind = Pipeline if params[0].dtype == torch.float32 else TorchOpsMasters
    return kind(params, grads, make)


def check_same_step(dtype: str, pipelines: Sequence[str], device: torch.device) -> None:
    """Hold the pipelines to one step of a small list; raises DifferentStep."""
    jobs = [Job(WARM_UP_LIST, dtype, name, device, 1) for name in pipelines]
    first, *others = [job.start() for job in jobs]
    params = [param.detach() for param in _start(jobs[0])[0]]
    for pipeline in (first, *others):
        pipelines_of.take_checked_steps(pipeline, pipeline._grads)
    for other in others:
        pipelines_of.compare_steps(params, first, other)


def release_unused(device: torch.device) -> None:
    """Give back what allocators keep for later, so that every peak is of memory in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def measure(job: Job) -> tuple[dict[str, float], str]:
    """The figures in MiB, and a note. Peaks are above what there was before the optimizer, `added`
    above what there was just before the step."""
    torch.set_num_threads(job.threads)
    own = meters(job.device)
    warm = job._replace(params=WARM_UP_LIST).start()  # code, threads and lazy imports are there now
    warm.step()
    warm.prepare()
    warm.step()
    del warm
    params, grads = _start(job)
    release_unused(job.device)
    before = [meter.now() for meter in own]
    own[0].reset_peak()
    pipeline = build(job.pipeline, params, grads)
    built = [meter.peak() for meter in own]
    first_start, first = _step(pipeline, own)
    state = state_bytes(pipeline)
    pipeline.prepare()
    release_unused(job.device)
    second_start, second = _step(pipeline, own)
    found = {"state_mib": state}
    for i, meter in enumerate(own):
        prefix = f"{meter.name}_" if i else ""
        for step, start, peak, highest in (
            ("first", first_start[i], first[i], max(built[i], first[i])),
            ("second", second_start[i], second[i], second[i]),
        ):
            found[f"{prefix}{step}_peak_mib"] = highest - before[i]
            found[f"{prefix}{step}_beyond_state_mib"] = highest - before[i] - state
            found[f"{prefix}{step}_added_mib"] = peak - start
    note = f"params {sum(param.nbytes for param in params) / MIB:.1f} MiB; {pipeline.describe()}"
    return {name: n_bytes / MIB for name, n_bytes in found.items()}, note.removesuffix("; ")


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


def in_a_process(job: Job) -> tuple[dict[str, float], str]:
    """With this process's path, so that it imports the same packages."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as one:
            found, note = one.submit(measure, job).result()
    except BrokenProcessPool as error:
        raise NotMeasured("the process was ended: out of memory?") from error
    except (MemoryError, OSError, RuntimeError) as error:
        raise NotMeasured(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if note.endswith("backend reference"):
        raise NotMeasured("fusedopt has only its reference backend here: python -m fusedopt")
    return found, note


def processes_at_a_time(params: str, device: torch.device) -> int:
    """Peaks do not depend on what else runs, as long as everything fits."""
    if device.type == "cuda":
        return 1
    need = BYTES_PER_PARAM_AT_PEAK * sum(math.prod(shape) for shape in LISTS[params]())
    fit = available_bytes() // need
    if fit < 1:
        raise NotMeasured(f"needs {need / 2**30:.1f} GiB of free memory")
    return min(fit, os.cpu_count() or 1)


def measure_case(report: rows.Report, params: str, dtype: str, args: Any, bar: tqdm[Any]) -> None:
    check_same_step(dtype, [*dict.fromkeys([CHECKED_WITH, *args.pipelines])], args.device)
    jobs = [Job(params, dtype, name, args.device, args.threads) for name in args.pipelines]
    results = []
    with ThreadPoolExecutor(processes_at_a_time(params, args.device)) as executor:
        for result in executor.map(in_a_process, jobs * args.runs):
            results.append(result)
            bar.update()
    for index, name in enumerate(args.pipelines):
        runs = results[index :: len(jobs)]
        for figure in runs[0][0]:
            values = [found[figure] for found, _ in runs]
            report.add(figure, "MiB", values, case=f"{params}-{dtype}", pipeline=name,
                       note=runs[0][1])  # fmt: skip


def parse(arguments: Sequence[str] | None) -> Any:
    options = rows.parser("memory", __doc__)
    add = options.add_argument
    add("--device", type=rows.device, default=torch.device("cpu"))
    add("--params", nargs="+", choices=LISTS, metavar="LIST", help=", ".join(LISTS))
    add("--dtypes", nargs="+", choices=DTYPES, help="half with fp32 masters")
    add("--pipelines", nargs="+", choices=PIPELINES, default=PIPELINES)
    add("--runs", type=rows.positive, help="processes for each figure (default: 3)")
    add("--threads", type=rows.positive, default=1, help="of each process (default: 1)")
    rows.add_options(options, "default to a small list, once")
    args = options.parse_args(arguments)
    args.params = args.params or ["gpt-10M" if args.quick else "gpt2-124M"]
    args.dtypes = args.dtypes or (["fp32"] if args.quick else ["fp32", "bf16"])
    args.runs = args.runs or (1 if args.quick else 3)
    args.out = rows.destination(args, rows.gpu_name(args.device))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    report = rows.Report(rows.provenance(rows.gpu_name(args.device)), args.out)
    cases = [(params, dtype) for params in args.params for dtype in args.dtypes]
    problems = {}
    with tqdm(total=len(cases) * args.runs * len(args.pipelines), unit="process") as bar:
        for params, dtype in cases:
            try:
                measure_case(report, params, dtype, args, bar)
            except (NotMeasured, DifferentStep) as error:
                problems[f"{params}-{dtype}"] = error
    print(rows.wide(report.figures(), COLUMNS))
    if args.device.type == "cuda":
        print("\n" + rows.wide(report.figures(), [f"reserved_{name}" for name in COLUMNS[1:]]))
    for case, error in problems.items():
        print(f"{case} not measured: {error}")
    print(f"\n{rows.told(args.out)}")
    return int(bool(problems))
