"""Peak memory of the first and the second step: torch.optim against fusedopt.

python -m benchmarks memory            rows go to benchmarks/results/local
python -m benchmarks memory --quick    a small list once, printed only

Every figure comes from a process of its own. They count from the moment when parameters and
gradients are there and the optimizer is not. docs/training.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

import benchmarks
import fusedopt
from benchmarks.arguments import device, positive
from benchmarks.cpu_measure import available_bytes
from benchmarks.figures import Figures, common_columns, gpu_name, table
from benchmarks.param_sets import LISTS
from benchmarks.peak_memory import DTYPES, PIPELINES, Job, check_same_step
from benchmarks.pipelines import DifferentStep
from benchmarks.row_files import add_options, destination, told

# The packages are those that this process has, whatever lies on the path before them.
CHILD = """
import importlib.util, json, sys
for name, file in json.loads(sys.argv[1]).items():
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from benchmarks.peak_memory import Job, measure
print(json.dumps(measure(Job(**json.loads(sys.argv[2])))))
"""
PACKAGES = {"fusedopt": fusedopt.__file__, "benchmarks": benchmarks.__file__}
CHECKED_WITH = "torch_fused"  # by all pipelines, also where nothing else of torch's is measured
MIB = 2**20
BYTES_PER_PARAM_AT_PEAK = 40  # fp32: param, gradient and its source, two states, foreach's copies
STEPS = ("first", "second")
COLUMNS = ["state_mib"] + [
    f"{step}_{figure}_mib" for step in STEPS for figure in ("peak", "beyond_state", "added")
]


class NotMeasured(Exception):
    """Why there is no figure."""


def run_child(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, json.dumps(PACKAGES), json.dumps(asdict(job))]
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
    figures: Figures, case: str, pipeline: str, measured: Sequence[dict[str, Any]]
) -> None:
    note = f"params {measured[0]['param_bytes'] / MIB:.1f} MiB"
    if measured[0]["backend"]:
        note += f"; backend {measured[0]['backend']}"
    if not measured[0]["exact"]:
        note += "; lower bounds, since the peak cannot be reset here"
    state = [one["state_bytes"] / MIB for one in measured]
    figures.add(case, pipeline, "state_mib", "MiB", state, note)
    for index, meter in enumerate(measured[0]["peaks"]):
        prefix = "" if index == 0 else f"{meter}_"
        for step in STEPS:
            peak = [one["peaks"][meter][f"{step}_peak"] / MIB for one in measured]
            added = [one["peaks"][meter][f"{step}_added"] / MIB for one in measured]
            beyond = [whole - part for whole, part in zip(peak, state, strict=True)]
            own_note = f"{note}; {meter}"
            name = f"{prefix}{step}"
            figures.add(case, pipeline, f"{name}_peak_mib", "MiB", peak, own_note)
            figures.add(case, pipeline, f"{name}_beyond_state_mib", "MiB", beyond, own_note)
            figures.add(case, pipeline, f"{name}_added_mib", "MiB", added, own_note)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=device, default=torch.device("cpu"))
    parser.add_argument("--params", nargs="+", choices=LISTS, metavar="LIST", help=", ".join(LISTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="half with fp32 masters")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=PIPELINES)
    parser.add_argument("--runs", type=positive, help="processes for each figure (default: 3)")
    parser.add_argument("--threads", type=positive, default=1, help="of each process (default: 1)")
    add_options(parser, "default to a small list, once")
    args = parser.parse_args(arguments)
    args.params = args.params or ["gpt-10M" if args.quick else "gpt2-124M"]
    args.dtypes = args.dtypes or (["fp32"] if args.quick else ["fp32", "bf16"])
    args.runs = args.runs or (1 if args.quick else 3)
    args.out = destination(args, "-memory", gpu_name(args.device))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    figures = Figures(common_columns(args.device), args.out)
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
                add_figures(figures, case, pipeline, measured)
            figures.save()
    print(table(figures.rows, COLUMNS))
    if args.device.type == "cuda":
        print()
        print(table(figures.rows, [f"reserved_{name}" for name in COLUMNS[1:]]))
    for case, error in problems.items():
        print(f"{case} not measured: {error}")
    print(f"\n{told(args.out)}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
