"""One optimizer on the device and its twin on the CPU backend, fed with the same values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from cases import OptimizerCase
from gpu_helpers import DEVICE, backend, moved
from harness import FUSED, make_param, randn, set_grad
from tolerances import assert_same_bits, same_bits
from torch import Tensor

Grads = Sequence[Tensor | None]
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

    backend: str | None = None  # the one that the fixture `device` says is under test

    def __init__(
        self,
        rule: str,
        groups: Sequence[dict[str, Any]],
        devices: Sequence[torch.device] | None = None,
        **common: Any,
    ) -> None:
        n_params = sum(len(group["params"]) for group in groups)
        self.devices = list(devices or [DEVICE] * n_params)
        where = iter(self.devices)
        ours, twins = [], []
        for group in groups:
            hyper = {name: value for name, value in group.items() if name != "params"}
            first = self.devices[0]
            at_ours = {k: moved(v, first) if isinstance(v, Tensor) else v for k, v in hyper.items()}
            own = [make_param(moved(v, next(where))) for v in group["params"]]
            ours.append({**at_ours, "params": own})
            twins.append(
                {**hyper, "params": [make_param(moved(v, "cpu")) for v in group["params"]]}
            )
        self.params: list[Tensor] = [p for group in ours for p in group["params"]]
        self.twin_params: list[Tensor] = [p for group in twins for p in group["params"]]
        self.opt = FUSED[rule](ours, backend=self.backend or backend(), **common)
        self.twin = FUSED[rule](twins, backend="cpu", **common)

    @classmethod
    def of(cls, case: OptimizerCase, values: Sequence[Tensor], **common: Any) -> Twins:
        group = {"params": list(values), **case.hyper}
        return cls(case.rule, [group], **{**case.common, **common})

    def set(self, group: int = 0, **hyper: Any) -> None:
        """Change hyper-parameters of both, as a scheduler does."""
        for optimizer in (self.opt, self.twin):
            optimizer.param_groups[group].update(hyper)

    def give(self, grads: Grads) -> None:
        for param, twin_param, grad in zip(self.params, self.twin_params, grads, strict=True):
            set_grad(twin_param, grad)
            set_grad(param, None if grad is None else moved(grad, param.device))

    def step(
        self, grads: Grads, grad_scale: float | None = None, found_inf: float | None = None
    ) -> None:
        """With `grad_scale` or `found_inf` as a GradScaler leaves them on the optimizer."""
        self.give(grads)
        for optimizer, params in ((self.opt, self.params), (self.twin, self.twin_params)):
            given = {"grad_scale": grad_scale, "found_inf": found_inf}
            given = {name: value for name, value in given.items() if value is not None}
            for name, value in given.items():
                setattr(optimizer, name, torch.tensor(value, device=params[0].device))
            optimizer.step()
            for name in given:
                delattr(optimizer, name)

    def pairs(self) -> list[Pair]:
        grads = [
            (f"grad {index} was written to", param.grad, twin_param.grad)
            for index, (param, twin_param) in enumerate(
                zip(self.params, self.twin_params, strict=True)
            )
            if param.grad is not None
        ]
        return grads + everything(self.opt, self.params, self.twin, self.twin_params)

    def check(self) -> None:
        assert_pairs_agree(self.pairs())


class HostTwins(Twins):
    """Both on the CPU, also where there is a GPU: for a backend whose kernels a stand-in runs."""

    def __init__(self, rule: str, groups: Sequence[dict[str, Any]], **common: Any) -> None:
        n_params = sum(len(group["params"]) for group in groups)
        super().__init__(rule, groups, [torch.device("cpu")] * n_params, **common)

    @classmethod
    def of_lengths(
        cls,
        case: OptimizerCase,
        lengths: Sequence[int],
        dtype: torch.dtype = torch.float32,
        **common: Any,
    ) -> Any:
        group = {"params": values_of(lengths, dtype), **case.hyper}
        return cls(case.rule, [group], **{**case.common, **common})

    def run(self, dtype: torch.dtype | None = None, steps: int = 3) -> None:
        """Steps with gradients of `dtype`, or of the params' own, compared after each."""
        for step in range(steps):
            self.step(grads_like(self.params, step, dtype))
            self.check()


def values_of(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(n, n, dtype) for n in lengths]


def grads_like(
    params: Sequence[Tensor], step: int, dtype: torch.dtype | None = None, scale: float = 1.0
) -> list[Tensor]:
    """Of a size that changes from step to step, on both sides of the thresholds of clipping."""
    scale *= (1.0, 0.02, 5.0, 0.3)[step % 4]
    return [
        randn(tuple(p.shape), 1000 * step + index + 100, dtype or p.dtype, scale)
        for index, p in enumerate(params)
    ]


def copies(params: Sequence[Tensor]) -> Iterator[torch.nn.Parameter]:
    for param in params:
        yield make_param(param.detach().clone())
