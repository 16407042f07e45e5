"""The roofline: what a step's bytes take on a bandwidth, and what they would take on GPUs.

python -m benchmarks roofline --params bf16 --clip --scaler ours    bytes, sweep by sweep
python -m benchmarks roofline --clip --bandwidth 400 --numel 1e9    and the time of a step
python -m benchmarks roofline --table    the predictions of docs/performance.md
python -m benchmarks roofline --table many_ranks    those of a sharded model
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks import rows, traffic as counted
from benchmarks.rows import markdown, positive_float
from benchmarks.traffic import PIPELINES, Array, Options, Traffic, memory_per_param, traffic

# Of the all-reduce of the norm, per doubling of the ranks: a hop up and one down a tree, at the
# 5 us that NCCL's own cost model has for a hop over the network (src/graph/tuning.cc, Tree, LL).
ALPHA_S = 10e-6


def predict_seconds(
    bytes_per_param: float, numel: int, bandwidth: float, *, fixed_s: float = 0.0, ranks: int = 1,
    alpha_s: float = ALPHA_S,
) -> float:  # fmt: skip
    """One step, sharded evenly over ``ranks``, each with a bandwidth in bytes/s.

    ``alpha_s`` is for each doubling of ``ranks``: the norm's all-reduce is 192 bytes, all latency.
    """
    moved_s = bytes_per_param * math.ceil(numel / ranks) / bandwidth
    return moved_s + fixed_s + alpha_s * math.log2(ranks)


class Gpu(NamedTuple):
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
PREDICTED = Options(clip=True, scaler="ours")  # with bf16 params the same bytes


def ranks_needed(numel: int, n_bytes: int, memory: float) -> int:
    """The smallest power of two of which each has room for its share."""
    return 1 << max(0, math.ceil(math.log2(numel * n_bytes / (SHARE_OF_MEMORY * memory))))


def _cell(gpu: Gpu, numel: int) -> str:
    ranks = ranks_needed(numel, memory_per_param(PREDICTED), gpu.memory_gb * 1e9)
    bandwidth = SHARE_OF_PEAK * gpu.peak_gb_s * 1e9
    moved = traffic(PREDICTED).total
    seconds = predict_seconds(moved, numel, bandwidth, fixed_s=LAUNCHES_S, ranks=ranks)
    return f"{1e3 * seconds:.3g} ms ({ranks})"


def predictions() -> str:
    share = f"{SHARE_OF_PEAK:.0%} of it".replace("%", " %")
    gpus = (
        (g.name, f"{g.peak_gb_s:g}", f"{SHARE_OF_PEAK * g.peak_gb_s:.0f}", f"{g.memory_gb:g}",
         g.source)
        for g in GPUS
    )  # fmt: skip
    said = f"{traffic(PREDICTED).total} bytes moved, {memory_per_param(PREDICTED)} kept"
    lines = ((name, *(_cell(gpu, numel) for gpu in GPUS)) for name, numel in NUMELS.items())
    return "\n\n".join([
        markdown(("GPU", "peak GB/s", share, "memory, GB", "source of both"), gpus),
        "**PREDICTED, not measured: AdamW, fp32; AdamW, bf16 with fp32 masters. Clip and our "
        f"scaler: {said} per parameter**",
        markdown(("params", *(gpu.name for gpu in GPUS)), lines),
    ])  # fmt: skip


# ---- many ranks ----------------------------------------------------------------------------------

# Of an all-reduce of a few bytes: what NCCL's own cost model has for a tree with the protocol LL
# (src/graph/tuning.cc, baseLat and hwLat), and the bandwidth of a port of 400 Gb/s.
BASE_S, NVLINK_HOP_S, NETWORK_HOP_S = 6.8e-6, 0.6e-6, 5e-6
NETWORK_BYTES_S = 50e9
RANKS_OF_A_NODE = 8
MESSAGE_BYTES = 8 * 24  # the words of the norm, csrc/words.h


def message_seconds(ranks: int, nodes: int, n_bytes: int = MESSAGE_BYTES) -> float:
    """An all-reduce over ``ranks`` that lie on ``nodes``: up the tree and down again.

    The alpha of a hop is its latency, the beta is ``n_bytes`` over the network's bandwidth.
    """
    hops = math.ceil(math.log2(nodes))
    inside = (math.ceil(ranks / nodes) - 1) * NVLINK_HOP_S
    return BASE_S + 2 * (inside + hops * (NETWORK_HOP_S + n_bytes / NETWORK_BYTES_S))


MANY_NUMEL, MANY_GPU = 8_030_261_248, GPUS[2]  # Llama 3 8B
MANY_RANKS = (8, 64, 512, 4096, 32_768, 100_000)
# fp32 params, bf16 compute: no scaler, as in torchtitan.
MANY_OPTIONS = Options(clip=True)


class Mesh(NamedTuple):
    """How a model lies on N ranks: over how many it is sharded, and torch's messages for a clip,
    one for each sharded dimension: the ranks of each and their nodes."""

    label: str
    shards: Callable[[int], int]
    of_torch: Callable[[int], list[tuple[int, int]]]


def _nodes(ranks: int) -> int:
    return max(1, ranks // RANKS_OF_A_NODE)


MESHES = (
    Mesh("FSDP", lambda n: n, lambda n: [(n, _nodes(n))]),
    Mesh("HSDP, 8 shards", lambda n: 8, lambda n: [(8, 1)]),
    Mesh("FSDP and TP of 8", lambda n: n, lambda n: [(8, 1), (_nodes(n), _nodes(n))]),
)


def _many_cell(mesh: Mesh, ranks: int, pipeline: str) -> str:
    ours = pipeline == "fusedopt"
    sent = [(ranks, _nodes(ranks))] if ours else mesh.of_torch(ranks)
    messages_s = sum(message_seconds(*each) for each in sent if each[0] > 1)
    seconds = predict_seconds(
        traffic(MANY_OPTIONS, pipeline).total, MANY_NUMEL, SHARE_OF_PEAK * MANY_GPU.peak_gb_s * 1e9,
        fixed_s=LAUNCHES_S + messages_s, ranks=mesh.shards(ranks), alpha_s=0.0,
    )  # fmt: skip
    return f"{1e3 * seconds:.3g} ms ({1e6 * messages_s:.0f} us)"


def many_ranks() -> str:
    """Markdown: a step of a sharded model by the number of ranks, ours and torch's."""
    every = [(mesh, pipeline) for mesh in MESHES for pipeline in ("fusedopt", "torch fused")]
    header = ("ranks", *(f"{mesh.label}: {name.split()[0]}" for mesh, name in every))
    lines = ((f"{n:,}", *(_many_cell(each[0], n, each[1]) for each in every)) for n in MANY_RANKS)
    moved = [traffic(MANY_OPTIONS, name).total for name in ("fusedopt", "torch fused")]
    title = (
        f"**PREDICTED, not measured: AdamW, fp32, clip, no scaler, {MANY_NUMEL / 1e9:.1f}B "
        f"parameters on {MANY_GPU.name}; {moved[0]} bytes per parameter, torch {moved[1]}. In "
        "brackets the messages' part**"
    )
    return f"{title}\n\n{markdown(header, lines)}"


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


def _floor(moved: Traffic) -> str:
    return f"**{moved.total}**" + (f", floor {moved.floor}" if moved.floor != moved.total else "")


def cases() -> str:
    """Markdown: each case by each pipeline, with its parts."""
    lines = []
    for label, options in CASES.items():
        every = [traffic(options, pipeline) for pipeline in PIPELINES]
        sums = [" + ".join(f"{n} {size}" for n, size in moved.parts().items()) for moved in every]
        lines.append((label, *(f"{_floor(m)}: {s}" for m, s in zip(every, sums, strict=True))))
    return markdown(("case", *PIPELINES), lines)


def _named(arrays: Sequence[Array]) -> str:
    return ", ".join(f"{array.name} {array.itemsize}" for array in arrays)


def sweeps(options: Options, pipelines: Iterable[str] = PIPELINES) -> str:
    """Markdown: each sweep of each pipeline, the arrays it goes over and the size of an element."""
    lines: list[tuple[str, ...]] = []
    for pipeline in pipelines:
        moved = traffic(options, pipeline)
        for sweep in moved.sweeps:
            looks = f" (to follow others: {_named(sweep.looks)})" if sweep.looks else ""
            arrays = _named(sweep.reads) + looks, _named(sweep.writes)
            lines.append((pipeline, sweep.name, *arrays, str(sweep.total)))
        lines.append(("", "", "", "", _floor(moved)))
    return markdown(("pipeline", "sweep", "reads", "writes", "bytes"), lines)


def times(options: Options, bandwidth_gb_s: float, numel: int) -> str:
    """Markdown: a step of each pipeline on that bandwidth."""
    totals = {pipeline: traffic(options, pipeline).total for pipeline in PIPELINES}
    lines = (
        (pipeline, f"{1e3 * predict_seconds(total, numel, bandwidth_gb_s * 1e9):.4g} ms")
        for pipeline, total in totals.items()
    )
    return markdown(("pipeline", f"{numel:,} params at {bandwidth_gb_s:g} GB/s"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "predictions": predictions,
    "cases": cases,
    "adamw": lambda: sweeps(CASES["AdamW, fp32"]),
    "masters": lambda: sweeps(
        CASES["AdamW, fp16 or bf16 with fp32 masters"], ("fusedopt", "torch fused")
    ),
    "many_ranks": many_ranks,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = rows.parser("roofline", __doc__)
    add, sizes = parser.add_argument, counted.ITEMSIZE
    add("--optimizer", choices=counted.STATES, default="adamw")
    add("--params", choices=sizes, default="fp32", help="default: fp32")
    add("--grads", choices=sizes, default="", help="default: as --params")
    add("--no-masters", action="store_true", help="half params without masters")
    add("--clip", action="store_true", help="or whatever else wants the norm")
    add("--scaler", choices=counted.SCALERS, default="none")
    add("--bandwidth", type=positive_float, metavar="GB/S", help="read and written")
    add("--numel", type=positive_float, default=1e8, help="parameters (default: 1e8)")
    table = "a table of docs/performance.md instead"
    add("--table", choices=TABLES, nargs="?", const="predictions", help=table)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.table is not None:
        print(TABLES[args.table]())
        return
    half = (args.params, args.grads, not args.no_masters)
    options = Options(args.optimizer, *half, args.clip, args.scaler)
    kept = memory_per_param(options)
    print(f"{sweeps(options)}\n")
    print(f"memory of params, gradients, masters and states: {kept} bytes per parameter")
    if args.bandwidth is not None:
        print("\n" + times(options, args.bandwidth, int(args.numel)))
