"""The roofline: what a step's bytes take on a bandwidth, and what they would take on GPUs.

python -m benchmarks roofline --params bf16 --clip --scaler ours    bytes, sweep by sweep
python -m benchmarks roofline --clip --bandwidth 400 --numel 1e9    and the time of a step
python -m benchmarks roofline --table    the predictions of docs/performance.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.arguments import positive_float
from benchmarks.traffic import (
    ITEMSIZE,
    PIPELINES,
    SCALERS,
    STATES,
    Array,
    Options,
    memory_per_param,
    traffic,
)

# Of the all-reduce of the norm, per doubling of the ranks: a hop up and one down a tree, at the
# 5 us that NCCL's own cost model has for a hop over the network (src/graph/tuning.cc, Tree, LL).
ALPHA_S = 10e-6


def predict_seconds(
    bytes_per_param: float,
    numel: int,
    bandwidth: float,
    *,
    fixed_s: float = 0.0,
    ranks: int = 1,
    alpha_s: float = ALPHA_S,
) -> float:
    """One step, sharded evenly over ``ranks``.

    Args:
        bandwidth: bytes/s, read and written together, of each rank.
        fixed_s: what a step costs whatever its size: launches, latency.
        alpha_s: per doubling of ``ranks``: the norm's all-reduce is 12 bytes, so all of it is
            latency.
    """
    moved_s = bytes_per_param * math.ceil(numel / ranks) / bandwidth
    return moved_s + fixed_s + alpha_s * math.log2(ranks)


@dataclass(frozen=True)
class Gpu:
    name: str
    peak_gb_s: float
    memory_gb: float
    source: str


GPUS = (
    Gpu("RTX 2070 SUPER", 448, 8, "NVIDIA, GeForce RTX 2070 SUPER specifications"),
    Gpu("A100 80GB", 2039, 80, "NVIDIA A100 datasheet, 80GB SXM"),
    Gpu("H100 SXM", 3350, 80, "NVIDIA H100 datasheet, SXM"),
    Gpu("H200", 4800, 141, "NVIDIA H200 datasheet, SXM"),
    Gpu("B200", 8000, 180, "NVIDIA DGX B200 datasheet, an eighth of the system"),
    Gpu("MI300X", 5300, 192, "AMD Instinct MI300X data sheet"),
)
NUMELS = {"10M": 10**7, "100M": 10**8, "1B": 10**9, "10B": 10**10, "100B": 10**11, "1T": 10**12}
SHARE_OF_PEAK = 0.85
SHARE_OF_MEMORY = 0.8  # for params, gradients, masters and states; the rest is for activations
LAUNCHES_S = 5e-6  # both kernels' start and drain
PREDICTED = {
    "AdamW, fp32": Options(clip=True, scaler="ours"),
    "AdamW, bf16 with fp32 masters": Options(params="bf16", clip=True, scaler="ours"),
}


def ranks_needed(numel: int, n_bytes: int, memory: float) -> int:
    """The smallest power of two of which each has room for its share."""
    return 1 << max(0, math.ceil(math.log2(numel * n_bytes / (SHARE_OF_MEMORY * memory))))


def _cell(gpu: Gpu, numel: int, moved: int, kept: int) -> str:
    ranks = ranks_needed(numel, kept, gpu.memory_gb * 1e9)
    bandwidth = SHARE_OF_PEAK * gpu.peak_gb_s * 1e9
    seconds = predict_seconds(moved, numel, bandwidth, fixed_s=LAUNCHES_S, ranks=ranks)
    return f"{1e3 * seconds:.3g} ms ({ranks})"


def predictions() -> str:
    """Markdown. Options that move and keep the same bytes share a table."""
    share = f"{SHARE_OF_PEAK:.0%} of it".replace("%", " %")
    lines = [
        f"| GPU | peak GB/s | {share} | memory, GB | source of both |",
        "|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        used = f"{SHARE_OF_PEAK * gpu.peak_gb_s:.0f}"
        lines.append(
            f"| {gpu.name} | {gpu.peak_gb_s:g} | {used} | {gpu.memory_gb:g} | {gpu.source} |"
        )
    alike: dict[tuple[int, int], list[str]] = {}
    for name, options in PREDICTED.items():
        alike.setdefault((traffic(options).total, memory_per_param(options)), []).append(name)
    for (moved, kept), names in alike.items():
        lines += ["", f"**PREDICTED, not measured: {'; '.join(names)}. Clip and our scaler: "
                  f"{moved} bytes moved, {kept} kept per parameter**", ""]  # fmt: skip
        lines += [f"| params | {' | '.join(gpu.name for gpu in GPUS)} |", "|---" * 7 + "|"]
        for label, numel in NUMELS.items():
            cells = [_cell(gpu, numel, moved, kept) for gpu in GPUS]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


CASES = {
    "AdamW, fp32": Options(clip=True, scaler="ours"),
    "AdamW, fp32, torch's scaler": Options(clip=True, scaler="torch"),
    "AdamW, fp32, no clip": Options(scaler="ours"),
    "AdamW, fp32, no clip, no scaler": Options(),
    "AdamW with amsgrad, fp32": Options("adamw-amsgrad", clip=True, scaler="ours"),
    "SGD with momentum, fp32": Options("sgd-momentum", clip=True, scaler="ours"),
    "SGD, fp32": Options("sgd", clip=True, scaler="ours"),
    "AdamW, fp16 or bf16 with fp32 masters": Options(params="bf16", clip=True, scaler="ours"),
    "SGD with momentum, the same": Options("sgd-momentum", "bf16", clip=True, scaler="ours"),
    "AdamW, bf16 without masters": Options(params="bf16", masters=False, clip=True),
}


def cases() -> str:
    """Markdown: each case by each pipeline, with its parts."""
    lines = [f"| case | {' | '.join(PIPELINES)} |", "|---" * (1 + len(PIPELINES)) + "|"]
    for label, options in CASES.items():
        cells = []
        for pipeline in PIPELINES:
            moved = traffic(options, pipeline)
            parts = " + ".join(f"{name} {n_bytes}" for name, n_bytes in moved.parts().items())
            floor = f", floor {moved.floor}" if moved.floor != moved.total else ""
            cells.append(f"**{moved.total}**{floor}: {parts}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _named(arrays: Sequence[Array]) -> str:
    return ", ".join(f"{array.name} {array.itemsize}" for array in arrays)


def sweeps(options: Options, pipelines: Iterable[str] = PIPELINES) -> str:
    """Markdown: each sweep of each pipeline, the arrays it goes over and the size of an element."""
    lines = ["| pipeline | sweep | reads | writes | bytes |", "|---|---|---|---|---|"]
    for pipeline in pipelines:
        moved = traffic(options, pipeline)
        for sweep in moved.sweeps:
            looks = f" (to follow others: {_named(sweep.looks)})" if sweep.looks else ""
            lines.append(
                f"| {pipeline} | {sweep.name} | {_named(sweep.reads)}{looks} "
                f"| {_named(sweep.writes)} | {sweep.total} |"
            )
        floor = f", floor {moved.floor}" if moved.floor != moved.total else ""
        lines.append(f"| | | | | **{moved.total}**{floor} |")
    return "\n".join(lines)


def times(options: Options, bandwidth_gb_s: float, numel: int) -> str:
    """Markdown: a step of each pipeline on that bandwidth."""
    lines = [f"| pipeline | {numel:,} params at {bandwidth_gb_s:g} GB/s |", "|---|---|"]
    for pipeline in PIPELINES:
        seconds = predict_seconds(traffic(options, pipeline).total, numel, bandwidth_gb_s * 1e9)
        lines.append(f"| {pipeline} | {1e3 * seconds:.4g} ms |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "predictions": predictions,
    "cases": cases,
    "adamw": lambda: sweeps(CASES["AdamW, fp32"]),
    "masters": lambda: sweeps(
        CASES["AdamW, fp16 or bf16 with fp32 masters"], ("fusedopt", "torch fused")
    ),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--optimizer", choices=STATES, default="adamw")
    parser.add_argument("--params", choices=ITEMSIZE, default="fp32", help="default: fp32")
    parser.add_argument("--grads", choices=ITEMSIZE, default="", help="default: as --params")
    parser.add_argument("--no-masters", action="store_true", help="half params without masters")
    parser.add_argument("--clip", action="store_true", help="or whatever else wants the norm")
    parser.add_argument("--scaler", choices=SCALERS, default="none")
    parser.add_argument("--bandwidth", type=positive_float, metavar="GB/S", help="read and written")
    parser.add_argument(
        "--numel", type=positive_float, default=1e8, help="parameters (default: 1e8)"
    )
    parser.add_argument(
        "--table",
        choices=TABLES,
        nargs="?",
        const="predictions",
        help="a table of docs/performance.md instead",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.table is not None:
        print(TABLES[args.table]())
        return
    options = Options(
        args.optimizer, args.params, args.grads, not args.no_masters, args.clip, args.scaler
    )
    print(sweeps(options))
    print(
        f"\nmemory of params, gradients, masters and states: {memory_per_param(options)} bytes "
        "per parameter"
    )
    if args.bandwidth is not None:
        print("\n" + times(options, args.bandwidth, int(args.numel)))
