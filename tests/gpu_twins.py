"""One optimizer on the device and its twin on the CPU backend, fed with the same values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from cases import OptimizerCase
from gpu_helpers import backend, device, moved
from harness import FUSED, make_param, randn, set_grad
from tolerances import assert_same_bits, same_bits
from torch import Tensor

from fusedopt.backends.records import DIGITS

Grads = Sequence[Tensor | None]
Dtypes = torch.dtype | Sequence[torch.dtype] | None
Pair = tuple[str, Tensor, Tensor]  # what it is, ours, the twin's
SCALARS = ("grad_norm", "clip_coef", "found_inf", "skipped_steps")


def with_one_nan(tensor: Tensor) -> Tensor:
    """The payload and the sign of a NaN are not part of the contract."""
    nan = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
    return torch.where(tensor != tensor, nan, tensor)


def assert_pairs_agree(pairs: Sequence[Pair]) -> None:
    """Bit for bit. One transfer for each dtype: there may be thousands of tensors."""
    for dtype in {ours.dtype for _, ours, _ in pairs}:
        own = [pair for pair in pairs if pair[1].dtype == dtype]
        for label, ours, twins in own:
            assert ours.shape == twins.shape and twins.dtype == dtype, f"{label}: {ours} {twins}"
        where = own[0][1].device
        left = torch.cat([ours.detach().flatten().to(where) for _, ours, _ in own]).cpu()
        right = torch.cat([twins.detach().flatten() for _, _, twins in own]).cpu()
        if same_bits(with_one_nan(left), with_one_nan(right)):
            continue
        for label, ours, twins in own:
            assert_same_bits(with_one_nan(ours.cpu()), with_one_nan(twins.cpu()), label)


def everything(optimizer: Any, params: Sequence[Tensor], twin: Any, others: Sequence[Tensor]):
    """Params, states and what the last step found, as pairs."""
    pairs: list[Pair] = []
    for index, (param, other) in enumerate(zip(params, others, strict=True)):
        pairs.append((f"param {index} {tuple(param.shape)} {param.dtype}", param, other))
        state, expected = optimizer.state.get(param, {}), twin.state.get(other, {})
        assert state.keys() == expected.keys(), f"state of param {index}"
        pairs += [(f"{name} of param {index}", state[name], expected[name]) for name in expected]
    for name in SCALARS:
        ours, twins = getattr(optimizer, name), getattr(twin, name)
        assert (ours is None) == (twins is None), name
        if twins is not None:
            pairs.append((name, ours, twins))
    return pairs


class Twins:
    """`groups` hold the values of the params on the CPU, in the layout they are to have.

    A tensor among the hyper-parameters goes to the device for ours and stays for the twin.
    """

    backend: str | None = None  # instead of the one that a fixture says is under test

    def __init__(
        self,
        rule: str,
        groups: Sequence[dict[str, Any]],
        devices: Sequence[torch.device] | None = None,
        **common: Any,
    ) -> None:
        where = iter(devices or [device()] * sum(len(group["params"]) for group in groups))
        ours, twins = [], []
        for group in groups:
            hyper = {name: value for name, value in group.items() if name != "params"}
            own = [make_param(moved(v, next(where))) for v in group["params"]]
            ours.append({**{k: on_device(v) for k, v in hyper.items()}, "params": own})
            others = [make_param(moved(v, "cpu")) for v in group["params"]]
            twins.append({**hyper, "params": others})
        self.params: list[Tensor] = [p for group in ours for p in group["params"]]
        self.twin_params: list[Tensor] = [p for group in twins for p in group["params"]]
        self.opt = FUSED[rule](ours, backend=self.backend or backend(), **common)
        self.twin = FUSED[rule](twins, backend="cpu", **common)
        self.both = ((self.opt, self.params), (self.twin, self.twin_params))

    @classmethod
    def of(cls, case: OptimizerCase, values: Sequence[Tensor], **common: Any) -> Any:
        group = {"params": list(values), **case.hyper}
        return cls(case.rule, [group], **{**case.common, **common})

    @classmethod
    def of_lengths(
        cls,
        case: OptimizerCase,
        lengths: Sequence[int],
        dtype: torch.dtype = torch.float32,
        **common: Any,
    ) -> Any:
        return cls.of(case, values_of(lengths, dtype), **common)

    def set(self, group: int = 0, **hyper: Any) -> None:
        """Change hyper-parameters of both, as a scheduler does."""
        for optimizer, _ in self.both:
            optimizer.param_groups[group].update(hyper)

    def give(self, grads: Grads) -> None:
        for param, twin_param, grad in zip(self.params, self.twin_params, grads, strict=True):
            set_grad(twin_param, grad)
            set_grad(param, None if grad is None else moved(grad, param.device))

    def step(
        self,
        grads: Grads | None = None,
        grad_scale: float | None = None,
        found_inf: float | None = None,
    ) -> None:
        """With `grad_scale` or `found_inf` as a GradScaler leaves them on the optimizer; with the
        gradients that are there, unless there are new ones."""
        if grads is not None:
            self.give(grads)
        given = {"grad_scale": grad_scale, "found_inf": found_inf}
        given = {name: value for name, value in given.items() if value is not None}
        for optimizer, params in self.both:
            for name, value in given.items():
                setattr(optimizer, name, torch.tensor(value, device=params[0].device))
            optimizer.step()
            for name in given:
                delattr(optimizer, name)

    def run(self, dtypes: Dtypes = None, steps: int = 3, first: int = 0) -> None:
        """Steps with gradients of `dtypes`, or of the params' own, compared after each."""
        for step in range(first, first + steps):
            self.step(grads_like(self.params, step, dtypes))
            self.check()

    def pairs(self) -> list[Pair]:
        both = zip(self.params, self.twin_params, strict=True)
        grads = [
            (f"grad {index} was written to", param.grad, twin_param.grad)
            for index, (param, twin_param) in enumerate(both)
            if param.grad is not None
        ]
        return grads + everything(self.opt, self.params, self.twin, self.twin_params)

    def check(self) -> None:
        """The words of the norm, too, where one device has them all; and that what the blocks of
        reduce add to is ready for the next step."""
        assert_pairs_agree(self.pairs())
        plan = self.opt._shared.plan  # none before the first step that torch's scaler lets through
        parts = [] if plan is None else plan.parts
        for part, table in itertools.product(parts, ("sums", "ticket")):
            assert not part.tensors[table].any(), f"{table}: not ready for the next step"
        if len(parts) == 1:
            ours = parts[0].tensors["words"].view(torch.int64).tolist()
            twins = self.twin._shared.plan._tables["words"].tolist()
            exact = self.opt.norm_bits == "exact"
            assert ours == twins or (exact and carried(ours) == carried(twins))


def carried(words: list[int]) -> list[int]:
    """The digits as one number: how much of it each word has is not part of the contract where
    backends add up the squares of elements in different steps."""
    return [sum(word << 32 * d for d, word in enumerate(words[:DIGITS])), *words[DIGITS:]]


def on_device(value: Any) -> Any:
    """Tensors, and those of a tuple."""
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    return moved(value, device()) if isinstance(value, Tensor) else value


def values_of(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(n, n, dtype) for n in lengths]


def shaped(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    return [randn(shape, seed + k, dtype) for k, shape in enumerate(shapes)]


def shifted(values: Tensor, offset: int) -> Tensor:
    """A view that begins `offset` elements into a larger buffer, and ends before its end."""
    buffer = torch.full((values.numel() + 32,), 77.0, dtype=values.dtype)
    return buffer[offset : offset + values.numel()].copy_(values)


def grads_like(
    params: Sequence[Tensor], step: int, dtypes: Dtypes = None, scale: float = 1.0
) -> list[Tensor]:
    """Of a size that changes from step to step, on both sides of the thresholds of clipping."""
    scale *= (1.0, 0.02, 5.0, 0.3)[step % 4]
    if dtypes is None:
        dtypes = [p.dtype for p in params]
    elif isinstance(dtypes, torch.dtype):
        dtypes = [dtypes] * len(params)
    return [
        randn(tuple(p.shape), 1000 * step + index + 100, dtype, scale)
        for index, (p, dtype) in enumerate(zip(params, dtypes, strict=True))
    ]


def copies(params: Sequence[Tensor]) -> Iterator[torch.nn.Parameter]:
    for param in params:
        yield make_param(param.detach().clone())
