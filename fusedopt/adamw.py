"""FusedAdamW."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.adam import Adam

from .optimizer import FusedOptimizer
from .rules.adamw import RULE


class FusedAdamW(FusedOptimizer):
    r"""AdamW with unscaling, inf/NaN check, gradient clipping and fp32 masters in the same step.

    With :math:`g` the unscaled and clipped gradient:

    .. math::
        \theta &\leftarrow \theta - \gamma \lambda \theta \\
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t}
            \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    (Loshchilov & Hutter, arXiv:1711.05101; ``amsgrad``: Reddi et al., arXiv:1904.09237.)

    The arguments up to ``fused`` are those of :class:`torch.optim.AdamW`, with its defaults and its
    errors. ``foreach``, ``fused`` and ``capturable`` are accepted and change nothing.

    Args:
        params: parameters, named parameters or param groups; fp32, fp16, bf16 or fp64.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor. Read at every step.
        betas: coefficients :math:`\beta_1, \beta_2`.
        eps: added to the denominator.
        weight_decay: :math:`\lambda`.
        amsgrad: use the maximum of all :math:`v` so far.
        maximize: maximize the objective.
        decoupled_weight_decay: False adds the decay to the gradient, as torch.optim.Adam does.
        max_grad_norm: clip the global norm over all groups to this, by torch's formula
            ``min(1, max_grad_norm / (norm + 1e-6))``. ``inf`` measures without clipping.
        norm_type: 2 or inf.
        max_grad_value: clamp each unscaled gradient element to ``[-max_grad_value,
            max_grad_value]``, after clipping by norm.
        master_weights: None or True: keep fp32 masters of fp16/bf16 parameters; False: none.
            "remainder": the master is the parameter and 16 bits beside it. For bf16 alone:
            "remainder8": 8 bits beside it; "dither": no master, the parameter is dithered.
        skip_nonfinite: without a GradScaler, skip a step whose gradients are not all finite. If
            False, they propagate as in torch. With a scaler such a step is always skipped.
        amp_scaling: False: let a GradScaler treat this like a stock optimizer (it unscales first),
            unless ranks have to agree about a skip. True: leave that to the step.
        backend: "cuda", "triton", "cpu", "reference" or "auto"; default: ``FUSEDOPT_BACKEND``, else
            "auto".
        norm_group: ProcessGroup or DeviceMesh of the ranks that share the norm and the decision to
            skip, for pipeline stages, FSDP1 and ZeroRedundancyOptimizer. None: the ranks of the
            parameters' meshes (FSDP2, tensor parallel), else this process alone (DDP).
        norm_bits: "exact": the sum of squares is that of all elements, rounded once, so the norm
            has the same bits however tensors are sharded. None: the sum of fp32 sums over chunks of
            8,192 elements, which is faster. Changes nothing with ``norm_type=inf``.
        state_dtype: how states are kept: None for fp32, "bf16" (2 bytes, dithered), "8bit" (about 1
            byte, blocks of 128), or a dict of these by the names of states. A param group may have
            its own (docs/memory.md).
        min_8bit_size: a parameter with fewer elements keeps fp32 where "8bit" is asked for.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the remedy.
        TypeError: a parameter is complex, of an integer dtype or a wrapper subclass.
        RuntimeError: ``differentiable=True``.
    """

    rule = RULE
    twin = Adam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
