"""The bytes that a step must read and write per parameter, derived from its options.

A sweep goes once over all parameters; each array that it reads counts once with the size of its
elements, and so does each that it writes. docs/performance.md says what that leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw-amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd-momentum": ("momentum_buffer",),
    "sgd": (),
}
SCALERS = ("none", "ours", "torch")


class Array(NamedTuple):
    name: str  # grad, param, or as in the optimizer's state
    itemsize: float  # bytes; of 8 bits with their share of a scale


MASTER = Array("master_param", 4)
STATE_SIZES = {"": 4, "bf16": 2, "8bit": 1 + 1 / 128}  # by state_dtype
REMAINDERS = {"remainder": 2, "remainder8": 1}  # by master_weights


@dataclass(frozen=True)
class Options:
    """What decides about the bytes. ``scaler`` matters to ours alone: torch has only its own."""

    optimizer: str = "adamw"
    params: str = "fp32"
    grads: str = ""  # as params
    masters: bool | str = True  # where params are half; or as master_weights
    clip: bool = False  # or anything else that wants the norm
    scaler: str = "none"
    state_dtype: str = ""  # of ours

    @property
    def has_master(self) -> bool:
        return bool(self.masters) and self.masters != "dither" and self.params != "fp32"

    @property
    def remainder(self) -> Array | None:
        size = REMAINDERS.get(str(self.masters))
        return Array("master_remainder", size) if size and self.has_master else None

    @property
    def param(self) -> Array:
        return Array("param", ITEMSIZE[self.params])

    @property
    def grad(self) -> Array:
        return Array("grad", ITEMSIZE[self.grads or self.params])

    def states(self, itemsize: float = 4) -> tuple[Array, ...]:
        return tuple(Array(name, itemsize) for name in STATES[self.optimizer])


class Sweep(NamedTuple):
    """One pass over all parameters, and the arrays that it reads and writes.

    ``looks`` are read only to follow what others wrote: the step needs no value from there.
    """

    name: str
    reads: tuple[Array, ...]
    writes: tuple[Array, ...] = ()
    looks: tuple[Array, ...] = ()

    @property
    def floor(self) -> float:
        return sum(array.itemsize for array in (*self.reads, *self.writes))

    @property
    def total(self) -> float:
        return self.floor + sum(array.itemsize for array in self.looks)


class Traffic(NamedTuple):
    """Bytes per parameter and step: what is moved, and the floor, which leaves looking out."""

    sweeps: tuple[Sweep, ...]

    @property
    def total(self) -> float:
        return sum(sweep.total for sweep in self.sweeps)

    @property
    def floor(self) -> float:
        return sum(sweep.floor for sweep in self.sweeps)

    def parts(self) -> dict[str, float]:
        """Bytes by the names of the sweeps, in order."""
        found: dict[str, float] = {}
        for sweep in self.sweeps:
            found[sweep.name] = found.get(sweep.name, 0) + sweep.total
        return found


def traffic(options: Options, pipeline: str = "fusedopt") -> Traffic:
    """The bytes of one of ``PIPELINES``, derived from its sweeps."""
    return Traffic(tuple(PIPELINES[pipeline](options)))


def _fusedopt(o: Options) -> list[Sweep]:
    """What csrc/*/reduce and update read and write; torch's scaler comes before them."""
    sweeps = []
    if o.scaler == "torch":
        sweeps.append(Sweep("unscale", (o.grad,), (o.grad,)))
    if o.clip or o.scaler == "ours":
        sweeps.append(Sweep("reduce", (o.grad,)))
    states = o.states(STATE_SIZES[o.state_dtype])
    if o.has_master and o.remainder is None:
        kept = (MASTER, *states)
        return [*sweeps, Sweep("update", (o.grad, *kept), (*kept, o.param), looks=(o.param,))]
    beside = () if o.remainder is None else (o.remainder,)
    kept = (o.param, *beside, *states)
    return [*sweeps, Sweep("update", (o.grad, *kept), kept)]


def _around(o: Options, step: Callable[[Options, Array, Array], list[Sweep]]) -> list[Sweep]:
    """torch's scaler and clip_grad_norm_ around a step; masters are kept by hand, as frameworks do.

    With masters the scaler and the clip see gradients that were cast up.
    """
    grad = Array("master_grad", 4) if o.has_master else o.grad
    param = MASTER if o.has_master else o.param
    sweeps = [Sweep("cast up", (o.grad,), (grad,))] if o.has_master else []
    if o.scaler != "none":
        sweeps.append(Sweep("unscale", (grad,), (grad,)))
    if o.clip:
        sweeps += [Sweep("norm", (grad,)), Sweep("clip", (grad,), (grad,))]
    sweeps += step(o, grad, param)
    return [*sweeps, Sweep("cast down", (MASTER,), (o.param,))] if o.has_master else sweeps


def _fused_step(o: Options, grad: Array, param: Array) -> list[Sweep]:
    """fused=True. Where nobody called unscale_ the kernel does, and writes the gradients back."""
    kept = (param, *o.states(param.itemsize))
    unscales = o.scaler != "none" and not o.clip
    return [Sweep("update", (grad, *kept), (*kept, grad) if unscales else kept)]


def _foreach_step(o: Options, grad: Array, param: Array) -> list[Sweep]:
    """foreach=True: a sweep for each operation of torch/optim/{adam,sgd}.py, weight decay on."""
    temp, states = Array("temporary", param.itemsize), o.states(param.itemsize)
    operations: list[tuple[tuple[Array, ...], tuple[Array, ...]]] = []
    if o.optimizer.startswith("adamw"):
        exp_avg, exp_avg_sq, *maximum = states
        operations += [((param,), (param,)), ((exp_avg, grad), (exp_avg,))]
        operations += [((exp_avg_sq,), (exp_avg_sq,)), ((exp_avg_sq, grad), (exp_avg_sq,))]
        operations += [((m, exp_avg_sq), (m,)) for m in maximum]
        operations += [((maximum[0] if maximum else exp_avg_sq,), (temp,))]
        operations += [((temp,), (temp,))] * 2  # / sqrt(bias_correction2), + eps
        operations += [((param, exp_avg, temp), (param,))]
    else:
        operations += [((grad, param), (temp,))]
        for buffer in states:
            operations += [((buffer,), (buffer,)), ((buffer, temp), (buffer,))]
        operations += [((param, states[0] if states else temp), (param,))]
    return [Sweep("update", reads, writes) for reads, writes in operations]


PIPELINES: dict[str, Callable[[Options], list[Sweep]]] = {
    "fusedopt": _fusedopt,
    "torch fused": lambda o: _around(o, _fused_step),
    "torch foreach": lambda o: _around(o, _foreach_step),
}


def memory_per_param(o: Options) -> float:
    """Bytes that live through the step: param, gradient, master and states of ours."""
    master = (o.remainder or MASTER,) if o.has_master else ()
    states = o.states(STATE_SIZES[o.state_dtype])
    return sum(array.itemsize for array in (o.param, o.grad, *master, *states))
