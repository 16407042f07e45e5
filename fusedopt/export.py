"""Checkpoints for other optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .codecs import LOG8, LOG8_POSITIVE, SCALE, Codec, decode, decode_each, n_scales
from .plan.local import local_of, wrapped
from .rules.declaration import POSITIVE

_CODES = LOG8.suffix


def to_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with fp32 states under torch's names, for ``torch.optim`` to load.

    8-bit states are decoded. Their scales stay beside them: if the checkpoint comes back, unchanged
    values get the codes that they had. bf16 states become fp32. Remainders are left out: they are
    part of a master, which no optimizer of torch keeps.

    Args:
        state_dict: of an optimizer of fusedopt; it stays as it is. Entries that are no states of
            8 or 16 bits are shared with the result.

    Returns:
        A new ``state_dict``. A param group keeps its keys.

    Raises:
        KeyError: codes without scales.
    """
    state = {}
    for key, own in state_dict["state"].items():
        state[key] = _plain(key, own) if isinstance(own, dict) else own
    return {**state_dict, "state": state}


def _decoded(codec: Codec, codes: Tensor, scales: Tensor) -> Tensor:
    if scales.shape == (n_scales(local_of(codes).numel()),):
        return wrapped(decode(codec, local_of(codes), scales, None), codes)
    return wrapped(decode_each(codec, local_of(codes), local_of(scales)), codes)


def _plain(key: Any, own: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for name, value in own.items():
        of = str(name).removesuffix(_CODES)
        if name == "master_remainder":
            continue
        if of != name:
            if name + SCALE not in own:
                raise KeyError(
                    f"to_torch: state {name!r} of parameter {key!r} lacks its {name + SCALE!r}; "
                    "pass what the optimizer's state_dict() returned"
                )
            codec = LOG8_POSITIVE if of in POSITIVE else LOG8
            out[of] = _decoded(codec, value, own[name + SCALE])
        elif getattr(value, "is_floating_point", lambda: False)() and value.itemsize == 2:
            out[name] = value.float()
        else:
            out[name] = value
    return out
