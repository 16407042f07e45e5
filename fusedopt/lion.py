"""FusedLion."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.adam import Adam

from .optimizer import FusedOptimizer
from .rules.lion import RULE


class FusedLion(FusedOptimizer):
    r"""Lion with unscaling, inf/NaN check, gradient clipping and fp32 masters in the same step.

    With :math:`g` the unscaled and clipped gradient:

    .. math::
        \theta &\leftarrow \theta - \gamma \lambda \theta \\
        \theta &\leftarrow \theta - \gamma \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    (Chen et al., arXiv:2302.06675.) Every parameter moves by :math:`\gamma`, or not at all where
    the sign is zero. So the paper takes 3 to 10 times less ``lr`` than for AdamW, and as many times
    more ``weight_decay``. The sign of NaN is zero: a gradient of NaN stays in :math:`m`, and the
    parameter stands still, unless a scaler or ``skip_nonfinite`` skips the step.

    Args:
        params: parameters, named parameters or param groups; fp32, fp16, bf16 or fp64.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor. Read at every step.
        betas: coefficients :math:`\beta_1` of the direction and :math:`\beta_2` of the state.
        weight_decay: :math:`\lambda`.
        maximize: maximize the objective.
        foreach, capturable, fused: accepted and change nothing, as in :class:`FusedAdamW`.
        decoupled_weight_decay: False adds the decay to the gradient.
        max_grad_norm, norm_type, max_grad_value, master_weights, skip_nonfinite, amp_scaling,
            backend, norm_group, norm_bits, state_dtype, min_8bit_size: as in :class:`FusedAdamW`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedAdamW`.
    """

    rule = RULE
    twin = Adam  # torch has no Lion, but a class with these arguments

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        max_grad_value: float | None = None,
        master_weights: bool | str | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool | None = None,
        backend: str | None = None,
        norm_group: Any = None,
        norm_bits: str | None = None,
        state_dtype: str | dict[str, str | None] | None = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, locals())
