"""What the examples share: arguments, stopwatch, table, plot and the comparison of bits."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUT = Path(__file__).with_name("out")


def argument_parser(description: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps, at least 2")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--device", type=torch.device, default=device)
    parser.add_argument("--backend", help="fusedopt's backend, such as cpu or reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="for plot and checkpoint")
    return parser


def add_baseline_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", choices=("fused", "foreach"), default="fused", help="torch's implementation"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the checkpoint needs a middle")
    return args


def prepare(args: argparse.Namespace) -> None:
    """A folder to write to; on a GPU kernels that repeat their bits, as resuming needs."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would fill every new tensor with NaN, which costs time and buys nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Stopwatch:
    """``with stopwatch:`` adds one time in milliseconds to ``times``; waits for the GPU.

    A trace of torch.profiler shows it as a range called ``name``.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.times: list[float] = []

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> None:
        self._wait()
        self.range = record_function(self.name)
        self.range.__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.times.append(1e3 * (time.perf_counter() - self.start))
        self.range.__exit__(*error)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *rest)).rstrip())


def differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    """Where two nested state dicts differ, tensors bit by bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype or not torch.equal(_bits(left), _bits(right)):
            yield path
    elif isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            yield from differences(left.get(key), right.get(key), f"{path}/{key}")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            yield path
        for index, pair in enumerate(zip(left, right, strict=False)):
            yield from differences(*pair, f"{path}/{index}")
    elif left != right:
        yield path


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Of a DTensor those of this rank's part."""
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach().cpu().contiguous().flatten().view(torch.uint8)


def report_resume(found: Sequence[str], path: Path, step: int, steps: int) -> int:
    """Print the verdict on the resumed run; return the program's exit status."""
    where = f"checkpoint {path}: saved after step {step}, loaded into fresh objects, run to {steps}"
    if not found:
        print(f"{where}: identical to the last bit")
        return 0
    print(f"{where}: NOT identical, {len(found)} entries differ, such as {sorted(found)[0]}")
    return 1


def plot_runs(path: Path, title: str, runs: Sequence[Any]) -> None:
    """Loss of every step on the left, time of the optimizer's part on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (losses, times) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, run in enumerate(runs):
        # The losses lie on top of each other: from wide and pale to thin and dark.
        width, style = 5.0 - 4.0 * index / (len(runs) - 1), ("-", "-", "--")[index]
        color = ("#bdbdbd", "#fd8d3c", "#08519c")[index if len(runs) == 3 else 2 * index]
        losses.plot(run.losses, style, color=color, linewidth=width, label=run.name)
        label = f"{run.name}: median {run.watch.median:.3g} ms"
        times.plot(run.watch.times, ".", color=color, markersize=4)
        times.axhline(run.watch.median, color=color, linewidth=1.5, label=label)
    fell_far = min(runs[0].losses) < 0.1 * runs[0].losses[0]
    losses.set(xlabel="step", ylabel="training loss", title="Loss")
    losses.set_yscale("log" if fell_far else "linear")
    times.set(xlabel="step", ylabel="ms", yscale="log", title="Unscale, clip, step and update")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_locator(NullLocator())
    for axes in (losses, times):
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"plot: {path}")
