"""``fusedopt.estimate_memory``: will it fit?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adamw import FusedAdamW
from .optimizer import FusedOptimizer
from .options import OPTION_NAMES, Options
from .rules.declaration import Group
from .sizes import MemoryEstimate, Place, modes_of


def estimate_memory(
    model: nn.Module | Tensor | Iterable[Any],
    optimizer: type[FusedOptimizer] = FusedAdamW,
    *,
    budget: int | None = None,
    activations: int = 0,
    device: str | None = None,
    **options: Any,
) -> MemoryEstimate:
    """What training takes with each precision of state. Allocates nothing.

    Args:
        model: a module, parameters, or param groups. They may be on the meta device. Of a DTensor,
            this rank's part counts.
        optimizer: the class.
        budget: bytes of the device; the table then says what fits.
        activations: bytes of everything else that is there at the peak.
        device: "cpu" or "cuda", for the optimizer's own tables; None: that of the parameters, and
            "cuda" for meta.
        options: of the optimizer. With ``state_dtype`` or ``master_weights`` the first row is what
            they ask for.

    Returns:
        Sizes equal to those of ``memory_footprint()`` with a native backend, once every parameter
        has state and a gradient that lies in memory as it does. A mode that the optimizer would
        refuse for these parameters is left out.

    Raises:
        ValueError: as the optimizer.
    """
    groups = _groups(model)
    params = [p for group in groups for p in group["params"]]
    whole = Options(**{k: v for k, v in options.items() if k in OPTION_NAMES})
    # The defaults of the class are those of an optimizer of anything.
    given = {k: v for k, v in options.items() if k not in OPTION_NAMES}
    defaults = optimizer([torch.empty(0, requires_grad=True)], **given).defaults
    if device is None:
        device = "cpu" if params and all(p.device.type == "cpu" for p in params) else "cuda"
    asked = whole.state_dtype is not None or whole.master_weights is not None
    place = Place(device != "cpu", activations, budget)
    full = [{**defaults, **group} for group in groups]
    return MemoryEstimate(modes_of(optimizer.rule, full, whole, asked, place))


def _groups(model: Any) -> list[Group]:
    if isinstance(model, nn.Module):
        return [{"params": list(model.parameters())}]
    entries: list[Any] = [model] if isinstance(model, Tensor) else list(model)
    if entries and isinstance(entries[0], Mapping):
        return [{**group, "params": _tensors(group["params"])} for group in entries]
    return [{"params": _tensors(entries)}]


def _tensors(params: Any) -> list[Tensor]:
    entries = [params] if isinstance(params, Tensor) else list(params)
    return [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
