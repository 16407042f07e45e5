"""FusedSGD."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.optim.sgd import SGD

from .callers import users_level
from .optimizer import FusedOptimizer
from .rules.declaration import Group
from .rules.sgd import RULE


class FusedSGD(FusedOptimizer):
    r"""SGD with unscaling, inf/NaN check, gradient clipping and fp32 masters in the same step.

    With :math:`g` the unscaled and clipped gradient:

    .. math::
        \theta &\leftarrow \theta - \gamma \lambda \theta \\
        b &\leftarrow g \text{ (first step)}, \qquad b \leftarrow \mu b + (1 - \tau) g \\
        \theta &\leftarrow \theta - \gamma b \quad (\text{nesterov: } g + \mu b)

    The arguments up to ``fused`` are those of :class:`torch.optim.SGD`, with its defaults and its
    errors, **except that weight decay is decoupled** (SGDW, arXiv:1711.05101) unless
    ``decoupled_weight_decay=False``, which is exactly torch's SGD. The first momentum step is the
    first one *applied*: a step skipped for non-finite gradients does not count.

    Args:
        params: parameters, named parameters or param groups; fp32, fp16, bf16 or fp64.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor. Read at every step.
        momentum: :math:`\mu`.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`.
        nesterov: Nesterov momentum.
        maximize: maximize the objective.
        decoupled_weight_decay: False adds the decay to the gradient, as torch.optim.SGD does.
        max_grad_norm, norm_type, max_grad_value, master_weights, skip_nonfinite, amp_scaling,
            backend, norm_group, norm_bits, state_dtype, min_8bit_size: as in :class:`FusedAdamW`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedAdamW`.
    """

    rule = RULE
    twin = SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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

    def _check_loaded_groups(self, groups: list[Group]) -> None:
        for index, (own, saved) in enumerate(zip(self.param_groups, groups, strict=False)):
            decay, momentum = saved["weight_decay"], saved["momentum"]
            same = "decoupled_weight_decay" in saved or decay == 0 or momentum == 0
            if own["decoupled_weight_decay"] and not same:
                warnings.warn(
                    f"param group {index} of the state_dict has no decoupled_weight_decay, like "
                    f"torch.optim.SGD's: it was trained with weight_decay={decay} in the gradient. "
                    f"With momentum={momentum} that is up to 1 / (1 - momentum) times as strong as "
                    "here. `FusedSGD(params, decoupled_weight_decay=False)` goes on as it was "
                    "trained; to go on with decoupled_weight_decay=True, say so: "
                    "`for g in state_dict['param_groups']: g.update(decoupled_weight_decay=True)`",
                    stacklevel=users_level(),
                )
                return
