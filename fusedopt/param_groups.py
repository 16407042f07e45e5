"""Split a model's parameters into those that decay and those that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_BIAS_WORDS = {"bias", "biases"}
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# Layers that only carry "Norm" in their name, such as a NormedLinear with a
# normalised weight: what they hold is a weight, not a norm's scale.
_WEIGHT_LAYERS = (*_EMBEDDINGS, nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_WEIGHT_LAYER_WORDS = ("Embedding", "Linear", "Bilinear", "Conv")


def param_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Return the parameter groups of ``model``: weights decay, biases and norms do not.

    Weight decay pulls weights towards zero. For a bias or for the scale of a norm, zero is no
    better than any other value, so the usual recipe leaves them out. A parameter goes to the
    group without decay if one of these holds:

    * it has fewer than two dimensions;
    * its own name has the word ``bias`` in it (``bias``, ``in_proj_bias``, ``bias_k``);
    * the module that owns it is a norm: its class, or a class it derives from, has ``Norm`` in
      its name (``nn.LayerNorm``, ``nn.BatchNorm2d``, a ``MyRMSNorm`` of your own). Only what
      the norm itself owns counts, so a ``PreNorm`` around a linear layer takes nothing from
      that layer; a ``NormedLinear`` that derives from ``nn.Linear`` is a linear layer;
    * ``decay_embeddings=False`` and an ``nn.Embedding`` or ``nn.EmbeddingBag`` owns it.

    The originals of a parametrized weight (``torch.nn.utils.parametrize``) count as that weight.
    Of a scripted or traced module only the name of its class is known, and that name decides.

    Every parameter is in exactly one group, frozen ones too, so that thawing one later needs
    no new group. A parameter with several owners (tied weights) is left out of weight decay if
    any of its owners says so.

    Args:
        model: the module to take the parameters of.
        weight_decay: the decay of the first group, at least 0.
        decay_embeddings: False leaves embedding weights out of weight decay too.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...],
        "weight_decay": 0.0}]``, each in the order of ``model.parameters()``. A group that
        would be empty is left out. Add keys of your own (``lr``, say) before you hand the
        groups to the optimizer.

    Raises:
        TypeError: ``model`` is no ``nn.Module`` or ``weight_decay`` is no number.
        ValueError: ``weight_decay`` is negative or not finite, or a parameter of a lazy module
            has no shape yet.

    Example:
        >>> groups = fusedopt.param_groups(model, weight_decay=0.1)
        >>> optimizer = fusedopt.FusedAdamW(groups, lr=3e-4, max_grad_norm=1.0)
    """
    _check(model, weight_decay)
    decays: dict[nn.Parameter, bool] = {}
    for module, name, param in _owned_parameters(model):
        decays[param] = decays.get(param, True) and _decays(module, name, param, decay_embeddings)
    groups: list[dict[str, Any]] = [
        {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _check(model: nn.Module, weight_decay: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: model must be a torch.nn.Module, got {type(model).__name__}: pass "
            "the module itself, not its parameters, for only the module knows which are norms"
        )
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, Real):
        raise TypeError(
            f"param_groups: weight_decay must be a float, got {weight_decay!r}: "
            "pass a number of at least 0, such as 0.01"
        )
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(
            f"param_groups: weight_decay must be at least 0 and finite, got {weight_decay!r}: "
            "pass 0.0 for no decay"
        )


def _owned_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every (owner, name within the owner, parameter); a tied parameter comes once per owner."""
    parametrized: dict[nn.Module, tuple[nn.Module, str]] = {}  # by the module of its originals
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for weight, originals in module.get_submodule("parametrizations").named_children():
                if isinstance(originals, parametrize.ParametrizationList):
                    parametrized[originals] = (module, weight)
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_lazy(param):
                raise ValueError(
                    f"param_groups: parameter {f'{path}.{name}'.lstrip('.')!r} of a lazy module "
                    "has no shape yet: run the model once before you make the groups"
                )
            yield *parametrized.get(module, (module, name)), param


def _decays(module: nn.Module, name: str, param: nn.Parameter, decay_embeddings: bool) -> bool:
    if param.ndim < 2 or not _BIAS_WORDS.isdisjoint(name.split("_")):
        return False
    if _is_embedding(module):
        return decay_embeddings
    return not _is_norm(module)


def _is_embedding(module: nn.Module) -> bool:
    scripted = _scripted_class(module)
    if scripted is not None:
        return scripted in {cls.__name__ for cls in _EMBEDDINGS}
    return isinstance(module, _EMBEDDINGS)


def _is_norm(module: nn.Module) -> bool:
    scripted = _scripted_class(module)
    if scripted is not None:
        return "Norm" in scripted and not any(word in scripted for word in _WEIGHT_LAYER_WORDS)
    if isinstance(module, _WEIGHT_LAYERS):
        return False
    return any("Norm" in cls.__name__ for cls in type(module).__mro__)


def _scripted_class(module: nn.Module) -> str | None:
    """Name of the class that a scripted or traced module was made from."""
    if not isinstance(module, torch.jit.ScriptModule):
        return None
    return getattr(module, "original_name", None)  # PYTORCH_JIT=0: it has none
