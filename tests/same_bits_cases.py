"""The runs that same_bits.py compares, as a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from same_bits_scenes import FLOATS, INF, SCENES
from torch import Tensor

Pair = tuple[torch.dtype, torch.dtype]  # of a param and of its gradient
PAIRS: tuple[Pair, ...] = tuple(itertools.product(FLOATS, FLOATS))
DOUBLES: tuple[Pair, ...] = ((torch.float64, torch.float64), (torch.float64, torch.float32))
Shapes = dict[str, list[tuple[int, ...]]]
SHAPES: Shapes = {
    "few": [(n,) for n in (0, 1, 7, 300, 5, 2, 33, 1, 4, 40)],
    "all": [(n,) for n in (0, 1, 7, 255, 256, 8191, 8192, 8193, 20000)],
    "many": [(1 + n % 13,) for n in range(600)],
    "layout": [(3, 6, 5, 7), *[(n, 3, 2, 4) for n in range(1, 10)]],
}
# Where a step takes long.
SMALL: Shapes = {
    **SHAPES,
    "many": SHAPES["many"][:40],
    "all": [(n,) for n in (0, 1, 255, 256, 8193)],
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "transposed": lambda values: values.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda values: torch.stack([values, values], -1)[..., 0],
    "odd offset": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
}


@dataclass(frozen=True)
class Setting:
    """A way to run a backend."""

    backend: str
    threads: int = 1
    simd: str | None = None
    quick: bool = False  # only with all dtypes in one optimizer

    def __str__(self) -> str:
        if self.backend != "cpu":
            return self.backend
        return f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, {self.simd or 'widest'}"


@dataclass(frozen=True)
class Case:
    """One run: an optimizer of its own, over params of its own."""

    rule: str
    what: str  # one row of the printed table: all dtypes together
    groups: tuple[dict[str, Any], ...]  # each over params of every shape
    common: dict[str, Any] = field(default_factory=dict)
    scene: str = "steady"
    scaler: str | None = None
    size: str = "few"
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of params and of gradients
    alone: str = "same"  # dtypes with an optimizer to themselves: all pairs, equal ones, none
    resumed: str | None = None  # the form in which the old checkout has saved it halfway
    dtypes: tuple[Pair, ...] = PAIRS  # taken in turns by the params of a group
    masters: bool | None = True

    @property
    def dtype_names(self) -> str:
        names = ["mixed dtypes"]
        if len(self.dtypes) == 1:
            names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes[0]]
        return "/".join(names) + ("" if self.masters is not False else " without masters")

    @property
    def row(self) -> str:
        return f"{self.rule} {self.what}"

    @property
    def key(self) -> str:
        return f"{self.row}, {self.dtype_names}"

    def takes(self, pair: Pair) -> bool:
        """Whether this can be trained, and was not changed on purpose."""
        if self.scaler == "torch" and pair[0] != torch.float16:
            return False  # since e824931 we are a stock optimizer to torch's scaler; "torch, stock"
        unscales = self.scaler == "torch, stock" or self.scene == "unscaled"
        return not (unscales and pair[1] == torch.float16)  # torch refuses to unscale those

    @property
    def norm_bits(self) -> bool:
        """Whether the norm itself has to have the same bits, and not only its neighbour's."""
        return self.common.get("norm_type") == INF

    @property
    def clips(self) -> bool:
        """Whether the norm goes into the params, which then may differ."""
        return self.common.get("max_grad_norm", INF) < INF and not self.norm_bits


DECAY = {"lr": 0.02, "weight_decay": 0.1}
NESTEROV = {**DECAY, "momentum": 0.7, "nesterov": True}
COUPLED = {"decoupled_weight_decay": False}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {
        "defaults": {},
        "no decay": {"lr": 0.02, "weight_decay": 0.0},
        "decoupled decay": DECAY,
        "coupled decay": {**DECAY, **COUPLED},
        "maximize": {**DECAY, "maximize": True},
        "maximize, coupled": {**DECAY, **COUPLED, "maximize": True},
        "amsgrad": {**DECAY, "betas": (0.8, 0.9), "amsgrad": True},
        "amsgrad, coupled": {**DECAY, **COUPLED, "betas": (0.6, 0.9), "amsgrad": True},
        "beta1 = 0": {**DECAY, "betas": (0.0, 0.99)},
        "beta1 = 0.3": {**DECAY, "betas": (0.3, 0.99)},
        "beta1 = 0.5": {**DECAY, "betas": (0.5, 0.95), "eps": 1e-3},
        "both betas 0": {**DECAY, "betas": (0.0, 0.0)},
        "betas near 1": {**DECAY, "betas": (1 - 1e-5, 1 - 1e-7)},
        "betas that round to 1": {**DECAY, "betas": (1 - 1e-9, 1 - 1e-9)},
        "eps = 0": {**DECAY, "eps": 0.0},
        "large eps": {"lr": 0.5, "eps": 0.1, "weight_decay": 0.05},
        "lr = 0": {**DECAY, "lr": 0.0},
        "options in tensors": {"lr": torch.tensor(0.02), "betas": tuple(torch.tensor([0.9, 0.99]))},
    },
    "sgd": {
        "defaults": {},
        "decoupled decay": DECAY,
        "coupled decay": {**DECAY, **COUPLED},
        "maximize": {**DECAY, "maximize": True},
        "maximize, coupled": {**DECAY, **COUPLED, "maximize": True},
        "momentum": {**DECAY, "momentum": 0.9},
        "momentum, coupled": {**DECAY, **COUPLED, "momentum": 0.9},
        "dampening": {**DECAY, "momentum": 0.8, "dampening": 0.4},
        "dampening = 1": {**DECAY, "momentum": 0.9, "dampening": 1.0},
        "nesterov": NESTEROV,
        "nesterov, coupled, maximize": {**NESTEROV, **COUPLED, "maximize": True},
        "lr = 0": {**DECAY, "momentum": 0.9, "lr": 0.0},
        "options in tensors": {"lr": torch.tensor(0.02), "weight_decay": torch.tensor(0.1)},
    },
}  # fmt: skip
FULL: dict[str, dict[str, Any]] = {
    "adamw": {**DECAY, "betas": (0.7, 0.8), "eps": 1e-4, "amsgrad": True, "maximize": True},
    "sgd": {**DECAY, "momentum": 0.6, "dampening": 0.3, "maximize": True},
}
NORMS: dict[str, dict[str, Any]] = {
    "clip by norm 2": {"max_grad_norm": 0.7},
    "clip by norm 2, then value": {"max_grad_norm": 9.0, "max_grad_value": 0.1},
    "clip by norm inf": {"max_grad_norm": 0.5, "norm_type": INF},
    "clip by norm 0": {"max_grad_norm": 0.0},
    "measure norm 2": {"max_grad_norm": INF},
    "measure norm inf": {"max_grad_norm": INF, "norm_type": INF},
}
SCALERS: dict[str, dict[str, Any]] = {
    "fusedopt": {},
    "torch": {},
    "torch, stock": {"amp_scaling": False},
    "subclass": {},
    "fusedopt, amp_scaling": {"amp_scaling": True},
    "torch, amp_scaling": {"amp_scaling": True},
}


def rows() -> Iterator[Case]:
    """What is trained, for params of any dtype."""
    for rule, table in OPTIONS.items():
        full = (FULL[rule],)
        for name, hyper in table.items():
            yield Case(rule, name, (hyper,), alone="all")
        yield Case(rule, "every option, a group each", tuple(table.values()))
        for scene in (name for name in SCENES if name != "unscaled"):
            clips = {"max_grad_value": 2.0}
            yield Case(rule, f"scene: {scene}", full, clips, scene, alone="all")
        skips = {"skip_nonfinite": True}
        yield Case(rule, "nonfinite, skipped", full, skips, "nonfinite")
        yield Case(rule, "clip by value", full, {"max_grad_value": 0.3}, alone="all")
        yield Case(rule, "clip by value, else plain", ({},), {"max_grad_value": 0.3}, alone="all")
        for name, common in SCALERS.items():
            for scene in ("steady", "nonfinite", "unscaled"):
                yield Case(rule, f"scaler: {name}, {scene}", full, common, scene, name)
        for size in ("all", "many"):
            yield Case(rule, f"sizes: {size}", full, size=size, alone="all")
            yield Case(rule, f"sizes: {size}, plain", ({},), skips, size=size)
        for of_param, of_grad in itertools.product(LAYOUTS, LAYOUTS):
            if "contiguous" not in (of_param, of_grad) and of_param != of_grad:
                continue
            what = f"layouts: {of_param}, grads {of_grad}"
            yield Case(rule, what, full, {}, size="layout", layouts=(of_param, of_grad))
        for name, common in NORMS.items():
            for scene in ("steady", "nonfinite", "extreme"):
                yield Case(rule, f"{name}: {scene}", full, common, scene)
            yield Case(rule, f"{name}: sizes", full, common, size="all")
            yield Case(rule, f"{name}: scaler", full, common, "nonfinite", "fusedopt")
        for form in ("state_dict", "pickle", "torch.save"):
            for scaler in ("fusedopt", "subclass"):
                what = f"resumed from {form}, scaler {scaler}"
                yield Case(rule, what, full, scaler=scaler, resumed=form)


def cases(setting: Setting, match: str = "") -> Iterator[Case]:
    """Those whose row has ``match`` in its name."""
    same = [pair for pair in PAIRS if pair[0] == pair[1]]
    pairs = {"all": list(PAIRS), "same": same}
    if setting.backend == "reference":
        pairs = {"all": [*same, *DOUBLES], "same": [*same, *DOUBLES]}
    if setting.backend == "triton":  # interpreted, a step takes long
        pairs = {"all": same[:1], "same": []}
    for row in (row for row in rows() if match in row.row):
        if setting.threads > 1 and row.size == "few":
            row = replace(row, size="all")  # there are too few elements for two threads
        mixed = replace(row, dtypes=tuple(filter(row.takes, PAIRS)))
        yield mixed
        if setting.quick:
            continue
        if row.alone == "all" or setting.backend != "triton":
            yield replace(mixed, masters=False)
        if setting.threads > 1 or setting.simd is not None or row.size == "layout":
            continue
        for pair in filter(row.takes, pairs[row.alone]):
            for masters in (None, False) if pair[0].itemsize == 2 else (None,):
                yield replace(row, dtypes=(pair,), masters=masters)
