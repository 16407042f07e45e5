"""reduce, finalize and update of a real optimizer on its own plan, called one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedopt
from benchmarks.param_sets import GRAD_NORM, GRAD_SCALE, Shape, make_params
from benchmarks.pipelines import ADAMW, MAX_GRAD_NORM, SGD, Unavailable, compare_steps
from benchmarks.traffic import Options, Traffic, memory_per_param, traffic
from fusedopt.plan.plan import SKIP

VERBS = ("reduce", "update")
CHECKED_NUMEL = 20_003
BY_HALF_PARAMS = 500.0  # half a move: what rounding a param without a master may change
_LARGEST_STD = 4096.0  # of scaled gradients, so that they are finite in fp16

_COUPLED: dict[str, Any] = {**SGD, "decoupled_weight_decay": False}
RULES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adamw": (fusedopt.FusedAdamW, ADAMW),
    "adamw-amsgrad": (fusedopt.FusedAdamW, {**ADAMW, "amsgrad": True}),
    "sgd-momentum": (fusedopt.FusedSGD, _COUPLED),
    "sgd": (fusedopt.FusedSGD, {**_COUPLED, "momentum": 0.0}),
}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Dtypes(NamedTuple):
    """What `--dtypes` names: `float16`; `bfloat16-float32`, params first; `bfloat16-no_masters`."""

    params: str
    grads: str
    masters: bool = True

    def __str__(self) -> str:
        both = self.params if self.params == self.grads else f"{self.params}-{self.grads}"
        return both if self.masters else f"{both}-no_masters"


DTYPES = {
    str(dtypes): dtypes
    for params in _SHORT
    for grads in _SHORT
    for masters in ((True,) if params == "float32" else (True, False))
    for dtypes in [Dtypes(params, grads, masters)]
}


class Workload(NamedTuple):
    """The rule and the dtypes that two verbs work on."""

    rule: str  # a key of RULES
    dtypes: Dtypes = DTYPES["float32"]

    def __str__(self) -> str:
        return f"{self.rule}:{self.dtypes}"

    def kernel(self, verb: str) -> str:
        """`update:adamw:bfloat16`; reducing is the same for every rule, and for every param."""
        return f"reduce:{self.dtypes.grads}" if verb == "reduce" else f"{verb}:{self}"

    def bytes_per_param(self, verb: str) -> int:
        (sweep,) = (s for s in self.traffic().sweeps if s.name == verb)
        return sweep.total

    def memory_per_param(self) -> int:
        return memory_per_param(self._options())

    def traffic(self) -> Traffic:
        return traffic(self._options())

    def _options(self) -> Options:
        d = self.dtypes
        return Options(self.rule, _SHORT[d.params], _SHORT[d.grads], d.masters, clip=True)

    def columns(self, backend: str, verb: str, shapes: Sequence[Shape]) -> dict[str, object]:
        """Of a row; the gradients are the same tensors in every call."""
        return {
            "pipeline": f"fusedopt_{backend}:{self.kernel(verb)}",
            "params": sum(math.prod(shape) for shape in shapes),
            "tensors": len(shapes),
            "dtype": self.dtypes.grads if verb == "reduce" else self.dtypes.params,
            "grads": "kept",
            "bytes_per_param": self.bytes_per_param(verb),
        }


class Verbs:
    """One optimizer that has taken a step; every later call finds the same gradients."""

    def __init__(
        self, workload: Workload, shapes: Sequence[Shape], backend: str,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        (make, options), dtypes = RULES[workload.rule], workload.dtypes
        self.params = make_params(shapes, getattr(torch, dtypes.params), device)
        self._optimizer = make(
            self.params, max_grad_norm=MAX_GRAD_NORM, skip_nonfinite=True,
            master_weights=dtypes.masters, backend=backend, **options,
        )  # fmt: skip
        self._optimizer.grad_scale = torch.full((), GRAD_SCALE, device=device)
        _give_grads(self.params, getattr(torch, dtypes.grads))
        self._optimizer.step()
        self._inputs = self._optimizer._step_inputs()
        self._plan = self._optimizer._current_plan(self._inputs)
        self._plan.begin(self._inputs)
        if self._inputs.scalars[SKIP] != 0:
            raise RuntimeError(f"{workload} on {backend}: the step was skipped, nothing to measure")

    def updated(self) -> list[Tensor]:
        """The fp32 tensors the update acts on: the params, or their masters."""
        states = self._optimizer.state
        return [states[param].get("master_param", param) for param in self.params]

    def reduce(self) -> None:
        """With finalize, which on a GPU is part of the same launch."""
        self._plan.begin(self._inputs)
        self._plan.reduce()
        self._plan.finalize()

    def update(self) -> None:
        self._plan.update()

    def both(self) -> None:
        self.reduce()
        self.update()


def check_same_step(workload: Workload, backends: Sequence[str], device: torch.device) -> None:
    """Hold the backends to one step of the same bits or nearly; raises DifferentStep."""
    shapes, dtypes = [(CHECKED_NUMEL,)], workload.dtypes
    params = make_params(shapes, getattr(torch, dtypes.params), device)
    first, *others = (Verbs(workload, shapes, backend, device) for backend in backends)
    for other in others:
        allowed = 1.0 if dtypes.masters else BY_HALF_PARAMS
        compare_steps([param.detach() for param in params], first, other, allowed)


def _give_grads(params: Sequence[Tensor], dtype: torch.dtype) -> None:
    numel = sum(param.numel() for param in params)
    std = min(_LARGEST_STD, GRAD_SCALE * GRAD_NORM / math.sqrt(numel))
    rng = torch.Generator(params[0].device).manual_seed(1)
    for param in params:
        if dtype != param.dtype:
            if not hasattr(param, "grad_dtype"):
                raise Unavailable(f"torch {torch.__version__} has no gradients of another dtype")
            param.grad_dtype = None
        values = torch.randn(param.shape, generator=rng, device=param.device)
        param.grad = values.mul_(std).to(dtype)
