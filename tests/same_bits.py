"""Whether another checkout trains to the same bits as this one: a command, not a test.

    python tests/same_bits.py OLD_CHECKOUT [--backends cpu reference triton cuda] [--steps 20]
                                           [--quick] [--match TEXT]

Both checkouts have to be built (docs/building.md); an old build is what is compared, whatever the
sources say. Each trains in a process of its own, on the CPU: "cuda" are its kernels compiled for
the CPU, "triton" those in Triton's interpreter. Every param, gradient, state, option and scale at
the end, and what every step found, are compared by their bits, payloads of NaNs included. Runs that
the old checkout saved halfway, as a state_dict or pickled with their scaler, are resumed by both.

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
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from same_bits_training import Packed, Results, Setting, trainings, unpacked
from tolerances import assert_same_bits

HERE = Path(__file__).resolve().parent
MOST_STEPS = {"triton": 5}  # whatever --steps says
SETTINGS = (
    Setting("cpu", 1),
    Setting("cpu", 2),
    Setting("cpu", 1, "generic"),
    Setting("reference"),
    Setting("cuda"),
    Setting("triton"),
)


def difference(old: Packed | None, new: Packed | None) -> str:
    """The first one, or nothing."""
    if old == new:
        return ""
    if old is None or new is None:
        return f"only the {'old' if new is None else 'new'} one has it"
    if old[:3] != new[:3]:
        return f"{old[:3]} is now {new[:3]}"
    try:
        assert_same_bits(unpacked(old), unpacked(new), "old and new")
    except AssertionError as found:
        return str(found)
    raise RuntimeError("other bytes and no other bits")


def compare(setting: Setting, match: str, old: Results, new: Results) -> tuple[int, int]:
    """How many tensors there are, and how many differ; prints a line for each row."""
    compared = differ = 0
    for row, group in groupby(trainings(setting, match), key=lambda training: training.what):
        found, tensors = [], 0
        for key in (training.key for training in group):
            names = old[key] | new[key]
            tensors += len(names)
            for name in names:
                text = difference(old[key].get(name), new[key].get(name))
                found += [f"{key}, {name}: {text}"] if text else []
        verdict = f"{len(found)} DIFFER, the first: {found[0]}" if found else "same"
        print(f"{row:58} {setting!s:24} {tensors:6} {verdict}", flush=True)
        compared, differ = compared + tensors, differ + len(found)
    return compared, differ


def train(checkout: Path, setting: Setting, steps: int, match: str, folder: str) -> Results:
    env = {k: v for k, v in os.environ.items() if k != "FUSEDOPT_SIMD"}
    env["PYTHONPATH"] = str(checkout)
    if setting.simd is not None:
        env["FUSEDOPT_SIMD"] = setting.simd
    out = Path(folder, "out")
    told = str(checkout), asdict(setting), steps, match, f"{folder}/saved", str(out)
    command = [sys.executable, str(HERE / "same_bits_training.py"), json.dumps(told)]
    if subprocess.run(command, env=env).returncode:
        raise SystemExit(f"{setting}: the process of {checkout} failed")
    results: Results = pickle.loads(out.read_bytes())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("old_checkout", type=Path)
    backends = list(dict.fromkeys(setting.backend for setting in SETTINGS))
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="only all dtypes in one optimizer")
    parser.add_argument("--match", default="", help="only the lines with this in their name")
    args = parser.parse_args()
    summary, differs = [], False
    for setting in (replace(setting, quick=args.quick) for setting in SETTINGS):
        if setting.backend not in args.backends:
            continue
        began, steps = time.time(), min(args.steps, MOST_STEPS.get(setting.backend, args.steps))
        with tempfile.TemporaryDirectory() as folder:
            old, new = (  # the old one first: it saves what both resume
                train(checkout, setting, steps, args.match, folder)
                for checkout in (args.old_checkout.resolve(), HERE.parent)
            )
        compared, differ = compare(setting, args.match, old, new)
        took = f"{len(old)} runs of {steps} steps, {time.time() - began:.0f} s"
        summary.append(f"{setting!s:24} {took}: {compared} tensors, {differ} differ")
        differs |= differ > 0
    print("", *summary, sep="\n")
    sys.exit(int(differs))


if __name__ == "__main__":
    main()
