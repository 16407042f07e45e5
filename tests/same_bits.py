"""Whether another checkout trains to the same bits as this one: a command, not a test.

    python tests/same_bits.py OLD_CHECKOUT [--backends cpu reference triton cuda] [--steps 50]
                                           [--quick] [--match TEXT]

Both checkouts have to be built (docs/building.md); an old build is what is compared, whatever the
sources say. Each trains in a process of its own, on the CPU: "cuda" are its kernels compiled for
the CPU, "triton" those in Triton's interpreter. Every param, gradient, state, option and scale at
the end, and what every step found, are compared by their bits, payloads of NaNs included. The norm
of type 2 may differ by one unit in the last place, and where it clips, params and states are only
reported. Runs that the old checkout saved halfway, as a state_dict or pickled with their scaler,
are resumed by both.

Prints a line for each kind of run and a summary. Exit status 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from same_bits_cases import Case, Setting, cases
from same_bits_training import Job, Packed, Results
from torch import Tensor

HERE = Path(__file__).resolve().parent
MOST_STEPS = {"triton": 5}  # whatever --steps says
NORM_ULPS = 1
FOLLOW_THE_NORM = ("param ", "exp_", "max_exp_", "momentum_", "master_", "clip_coef")


SETTINGS = (
    Setting("cpu", 1),
    Setting("cpu", 2),
    Setting("cpu", 1, "generic"),
    Setting("reference"),
    Setting("cuda"),
    Setting("triton"),
)


@dataclass
class Tally:
    """What a comparison has found."""

    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)  # follow from the norm
    norm_ulps: int = 0

    def add(self, other: Tally) -> None:
        self.tensors += other.tensors
        self.differences += other.differences
        self.reported += other.reported
        self.norm_ulps = max(self.norm_ulps, other.norm_ulps)

    def __str__(self) -> str:
        verdict = "same"
        if self.differences:
            verdict = f"{len(self.differences)} DIFFER, the first: {self.differences[0]}"
        if self.norm_ulps:
            verdict += f"; norm {self.norm_ulps} ulp away"
        if self.reported:
            verdict += f"; behind it differ {len(self.reported)}, the first: {self.reported[0]}"
        return verdict


# ---- comparing ----------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integer[tensor.element_size()])


def difference(old: Packed, new: Packed) -> str:
    """The first one, or nothing."""
    if old == new:
        return ""
    if old[:3] != new[:3]:
        return f"{old[:3]} is now {new[:3]}"
    before, now = old.tensor(), new.tensor()
    differ = bits(before) != bits(now)
    where = tuple(differ.nonzero()[0].tolist())
    nans = " (in payloads of NaNs only)" if (before.isnan() & now.isnan())[differ].all() else ""
    count = f"{int(differ.sum())} of {before.numel()} elements"
    return f"{count}, {before[where].item()!r} is now {now[where].item()!r} at {where}{nans}"


def ulps(old: Tensor, new: Tensor) -> int:
    """Between fp32 values of one sign; any NaN is like any other."""
    apart = (bits(old).long() - bits(new).long()).abs()
    return int(apart.masked_fill(old.isnan() & new.isnan(), 0).max())


def compare(case: Case, old: dict[str, Packed], new: dict[str, Packed]) -> Tally:
    tally = Tally(len(old))
    if old.keys() != new.keys():
        tally.differences.append(f"{case.key}: {sorted(old.keys() ^ new.keys())} in one only")
    for name in (name for name in old if name in new):
        found = difference(old[name], new[name])
        if not found:
            continue
        label = f"{case.dtype_names}, {name}: {found}"
        if name == "grad_norm" and not case.norm_bits:
            tally.norm_ulps = ulps(old[name].tensor(), new[name].tensor())
            if tally.norm_ulps <= NORM_ULPS:
                continue
        follows = case.clips and name.startswith(FOLLOW_THE_NORM)
        (tally.reported if follows else tally.differences).append(label)
    return tally


def print_table(setting: Setting, match: str, old: Results, new: Results) -> Tally:
    total = Tally()
    for row, group in groupby(cases(setting, match), key=lambda case: case.row):
        tally = Tally()
        for case in group:
            tally.add(compare(case, old[case.key], new[case.key]))
        print(f"{row:58} {setting!s:24} {tally.tensors:6} {tally}", flush=True)
        total.add(tally)
    return total


# ---- training -----------------------------------------------------------------------------------


def start(job: Job) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": job.checkout}
    env.pop("FUSEDOPT_SIMD", None)
    if job.setting.simd is not None:
        env["FUSEDOPT_SIMD"] = job.setting.simd
    script = str(HERE / "same_bits_training.py")
    return subprocess.Popen([sys.executable, script, json.dumps(asdict(job))], env=env)


def finish(processes: list[subprocess.Popen[bytes]], setting: Setting) -> None:
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"{setting}: a process failed")


def run(setting: Setting, checkouts: list[Path], steps: int, match: str) -> tuple[Results, Results]:
    """What the old and the new checkout end with."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(
                str(checkout), "train", setting, steps, match,
                saved=f"{folder}/saved", out=f"{folder}/{side}",
            )
            for checkout, side in zip(checkouts, ("old", "new"), strict=True)
        ]  # fmt: skip
        finish([start(replace(jobs[0], verb="save"))], setting)
        finish([start(job) for job in jobs], setting)
        old, new = (pickle.loads(Path(job.out).read_bytes()) for job in jobs)
        return old, new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("old_checkout", type=Path)
    backends = list(dict.fromkeys(setting.backend for setting in SETTINGS))
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="only all dtypes in one optimizer")
    parser.add_argument("--match", default="", help="only the lines with this in their name")
    args = parser.parse_args()
    checkouts = [args.old_checkout.resolve(), HERE.parent]
    summary, differs = [], False
    chosen = (setting for setting in SETTINGS if setting.backend in args.backends)
    for setting in (replace(setting, quick=args.quick) for setting in chosen):
        steps = min(args.steps, MOST_STEPS.get(setting.backend, args.steps))
        began = time.monotonic()
        tally = print_table(setting, args.match, *run(setting, checkouts, steps, args.match))
        n_cases = len(list(cases(setting, args.match)))
        summary.append(
            f"{setting!s:24} {n_cases} runs of {steps} steps, {tally.tensors} tensors: "
            f"{len(tally.differences)} differ; norm at most {tally.norm_ulps} ulp away, behind it "
            f"differ {len(tally.reported)}; {time.monotonic() - began:.0f} s"
        )
        differs |= bool(tally.differences)
    print("", *summary, sep="\n")
    sys.exit(int(differs))


if __name__ == "__main__":
    main()
