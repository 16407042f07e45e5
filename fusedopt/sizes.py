"""What training takes with each precision of state, in bytes, without allocating any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .backends.tables import plan_nbytes
from .codecs import SCALE, n_scales
from .options import Options
from .plan.checks import is_served
from .plan.kept import Names, check_masters, check_precision, kept_of
from .plan.local import local_of
from .plan.memory import is_dense
from .plan.options_table import Line
from .plan.plan import HALF_DTYPES
from .plan.state import STEP, Stream, streams_of
from .rules.declaration import Group, Rule

Arguments = dict[str, Any]
# From the most to the least state. The last two are for bf16 alone.
OF_FP32: tuple[Arguments, ...] = ({}, {"state_dtype": "bf16"}, {"state_dtype": "8bit"})
OF_HALF: tuple[Arguments, ...] = (
    {},
    {"master_weights": "remainder"},
    {"master_weights": "remainder", "state_dtype": "bf16"},
    {"master_weights": "remainder", "state_dtype": "8bit"},
)
OF_BF16: tuple[Arguments, ...] = (
    {"master_weights": "remainder8", "state_dtype": "8bit"},
    {"master_weights": "dither", "state_dtype": "8bit"},
)


@dataclass(frozen=True)
class Mode:
    """One way to keep state, and what it costs. Sizes are in bytes.

    Attributes:
        arguments: of the optimizer, that choose it.
        param, grad: of the parameters, and of a gradient for each that requires one.
        state: by the names in ``optimizer.state``.
        plan: of the optimizer's own tables.
        staging: of copies without gaps, of parameters that have gaps and of their gradients.
        activations: as given.
        traffic: bytes read and written a step, per parameter that is updated.
        budget: as given; None: unknown.
    """

    arguments: Arguments
    param: int
    grad: int
    state: dict[str, int]
    plan: int
    staging: int
    activations: int
    traffic: float
    budget: int | None

    @property
    def peak(self) -> int:
        sizes = (self.param, self.grad, *self.state.values(), self.plan, self.staging)
        return sum(sizes) + self.activations

    @property
    def fits(self) -> bool | None:
        return None if self.budget is None else self.peak <= self.budget

    @property
    def name(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.arguments.items()) or "the defaults"

    @property
    def fidelity(self) -> str:
        """What the study of docs/memory.md found, in words."""
        state = self.arguments.get("state_dtype")
        # Of AdamW; other rules were not measured.
        words = {None: "fp32", "bf16": "AdamW within 2 %", "8bit": "AdamW within 13 %"}
        text = words.get(state, "as its parts") if not isinstance(state, dict) else "as its parts"
        narrow = {"remainder8": "24-bit master", "dither": "no master", False: "no master"}
        master = narrow.get(self.arguments.get("master_weights"))
        return text if master is None else f"{text}, {master}"


@dataclass(frozen=True)
class MemoryEstimate:
    """The modes, from the most to the least state; ``print`` it for a table."""

    modes: list[Mode] = field(default_factory=list)

    def best(self) -> Mode | None:
        """The first mode that fits; None if none does, or without a budget."""
        return next((mode for mode in self.modes if mode.fits), None)

    def __str__(self) -> str:
        heads = (
            "mode",
            "params",
            "grads",
            "state",
            "staging",
            "peak",
            "fits",
            "B/step",
            "fidelity",
        )
        rows = [heads, *map(_cells, self.modes)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, len(heads) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)


def _cells(mode: Mode) -> tuple[str, ...]:
    fits = {None: "", True: "yes", False: "no"}[mode.fits]
    state, staging = sum(mode.state.values()), mode.staging + mode.plan
    sizes = map(readable, (mode.param, mode.grad, state, staging, mode.peak))
    return (mode.name, *sizes, fits, f"{mode.traffic:.1f}", mode.fidelity)


def readable(n_bytes: int) -> str:
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"


@dataclass(frozen=True)
class Place:
    """Where training is to happen."""

    on_device: bool = True  # a GPU
    activations: int = 0
    budget: int | None = None


def modes_of(
    rule: Rule, groups: Sequence[Group], options: Options, asked: bool, place: Place
) -> list[Mode]:
    """The modes for these parameters, from the most to the least state.

    Args:
        groups: with every option of the rule.
        asked: the first is what ``options`` say.

    Raises:
        ValueError: the optimizer would refuse what is asked for.
    """
    params = [p for group in groups for p in group["params"] if is_served(p)]
    halves = {p.dtype for p in params}.intersection(HALF_DTYPES)
    modes = OF_HALF if halves else OF_FP32
    if halves == {torch.bfloat16}:
        modes += OF_BF16
    names, plain = Line(rule).state_names, options.changed(master_weights=None, state_dtype=None)
    modes = tuple(mode for mode in modes if _is_allowed(rule, names, groups, plain, mode))
    if asked:
        wish = {name: getattr(options, name) for name in ("master_weights", "state_dtype")}
        wish = {name: value for name, value in wish.items() if value is not None}
        _check(rule, names, groups, options)
        modes = (wish, *(mode for mode in modes if mode != wish))
    return [_mode(rule, groups, plain.changed(**mode), mode, place) for mode in modes]


def _check(rule: Rule, names: Names, groups: Sequence[Group], options: Options) -> None:
    check_masters(groups, options)
    for group in groups:
        check_precision(rule, names, options, group)


def _is_allowed(
    rule: Rule, names: Names, groups: Sequence[Group], options: Options, mode: Arguments
) -> bool:
    try:
        _check(rule, names, groups, options.changed(**mode))
    except ValueError:
        return False
    return True


def _mode(
    rule: Rule, groups: Sequence[Group], options: Options, arguments: Arguments, place: Place
) -> Mode:
    line = Line(rule)
    state: dict[str, int] = {}
    param = grad = staging = numel = 0
    traffic, numels = 0.0, []
    measured = options.max_grad_norm is not None or options.skip_nonfinite
    for group in groups:
        kept = kept_of(rule, line.state_names, options, group)
        for p in group["params"]:
            local = local_of(p)
            n, size = local.numel(), local.element_size()
            param += n * size
            numels.append(n if is_served(p) else 0)
            if not is_served(p):
                continue
            grad += n * size
            staging += 0 if is_dense(local) else 2 * n * size  # and its gradient
            streams = streams_of(p, kept, options)
            own = _sizes(streams.all, n)
            for name, n_bytes in own.items():
                state[name] = state.get(name, 0) + n_bytes
            if streams.counts:
                state[STEP] = state.get(STEP, 0) + 4
            traffic += n * size * (4 if measured else 3) + 2 * sum(own.values())
            numel += n
    plan = plan_nbytes(rule, numels, len(groups), place.on_device)
    each = traffic / max(numel, 1)
    sizes = (param, grad, state, plan, staging)
    return Mode(arguments, *sizes, place.activations, each, place.budget)


def _sizes(streams: Iterable[Stream], n: int) -> dict[str, int]:
    sizes = {}
    for stream in streams:
        sizes[stream.name] = n * stream.codec.dtype.itemsize
        if stream.codec.scaled:
            sizes[stream.name + SCALE] = n_scales(n)
    return sizes


def advice(name: str, rule: Rule, groups: Sequence[Group], options: Options) -> str:
    """What to add to an allocator's message: the size of the state, and how to have the least.

    Args:
        name: of the optimizer.
    """
    now, *others = modes_of(rule, groups, options, True, Place())
    sizes = {sum(mode.state.values()): mode for mode in (*others, now)}
    least = sizes[min(sizes)]
    text = f"the state of {name} takes {readable(sum(now.state.values()))}"
    if least is now:
        return f"{text}, and there is no smaller one"
    arguments = ", ".join(f"{k}={v!r}" for k, v in least.arguments.items())
    return f"{text}; pass `{arguments}` to it, and it takes {readable(min(sizes))}"
