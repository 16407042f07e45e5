"""Split a model's parameters into those that decay and those that do not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WEIGHT_LAYERS = (
    *_EMBEDDINGS,
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # RMSNorm: RMS, Norm; Conv2d: Conv, d
_BIAS_WORDS = {"bias", "biases"}
# Words for layers and blocks. Their own parameters are weights, even in a LayerNormMLP.
_LAYER_WORDS = {
    *("linear", "bilinear", "dense", "conv", "embedding", "embed", "projection", "proj"),
    *("attention", "attn", "mlp", "ffn", "expert", "rnn", "lstm", "gru", "cell"),
    *("head", "classifier", "softmax", "loss", "block", "encoder", "decoder", "transformer"),
    *("net", "network", "model"),
}

# Parts that a wrapper adds to the names of the parameters inside it.
_OF_WRAPPERS = re.compile(
    r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
    r"|(?<![^.])parametrizations\.(?=\w+\.original\d*$)|(?<=\w)\.original\d*$"
)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_embeddings: bool = True,
    fp32_state_for: type[nn.Module] | tuple[type[nn.Module], ...] = (),
) -> list[dict[str, Any]]:
    """Return the parameter groups of ``model``: weights decay, biases and norms do not.

    Weight decay pulls weights towards zero. For a bias or for the scale of a norm, zero is no
    better than any other value, so the usual recipe leaves them out. A parameter goes to the
    group without decay if one of these holds:

    * it has fewer than two dimensions;
    * its own name has the word ``bias`` in it (``bias``, ``in_proj_bias``, ``bias_k``);
    * the module that owns it is a norm, as below;
    * ``decay_embeddings=False`` and an ``nn.Embedding`` or ``nn.EmbeddingBag`` owns it;
    * the model asks for it: a module's ``no_weight_decay()`` returns the parameter's name within
      that module (timm; ``*`` stands for any text), ``no_weight_decay_keywords()`` a part of the
      name (Swin), or the parameter has a true attribute ``_no_weight_decay`` (Mamba).

    Torch's norms and classes derived from them are norms; torch's layers with weights
    (``nn.Linear``, convolutions, attention and so on) are not. For another class its name decides,
    by the last word that means a norm (``Norm``, ``Layernorm``, ``Normalization``) or a layer
    (``Linear``, ``Conv``, ``MLP``, ``Head`` and so on). ``MyRMSNorm``, ``BatchNormAct2d`` and
    ``ConvLayerNorm`` are norms; ``LayerNormMLP``, ``NormHead`` and ``NormalizingFlow`` are not. If
    the name has no such word, the name of its base class decides. Only what the norm itself owns
    counts, so a ``PreNorm`` around a linear layer takes nothing from that layer.

    The originals of a parametrized weight (``torch.nn.utils.parametrize``) count as that weight.
    For a scripted or traced module only the name of its class is known, and that name decides.
    Shards count by the shape of the whole parameter: DTensors (FSDP2, tensor parallel), FSDP1 with
    ``use_orig_params=True``, DeepSpeed ZeRO-3. ``fully_shard`` drops the attributes of parameters:
    set ``_no_weight_decay`` again after it.

    Every parameter is in exactly one group, frozen ones too, so that thawing one later needs
    no new group; a frozen one may be of any dtype and layout, or without a shape yet. A parameter
    with several owners (tied weights) is left out of weight decay if any of its owners says so.

    Args:
        model: the module to take the parameters of.
        weight_decay: the decay of the first group, at least 0.
        decay_embeddings: False leaves embedding weights out of weight decay too.
        fp32_state_for: classes of modules, such as ``nn.Embedding``. What they own keeps fp32
            state, whatever the optimizer's ``state_dtype``: it goes to groups of its own, after the
            others, with ``"state_dtype": None``.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...],
        "weight_decay": 0.0}]``, each in the order of ``model.parameters()``. A group that
        would be empty is left out. Add keys of your own (``lr``, say) before you hand the
        groups to the optimizer.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, ``weight_decay`` is no number,
            ``fp32_state_for`` has something that is no class of modules, or what
            ``no_weight_decay()`` or ``no_weight_decay_keywords()`` returns is no set of str.
        ValueError: ``weight_decay`` is negative or not finite, one of those names is empty, or the
            shape of a parameter that is not frozen cannot be told: it is of a lazy module, of FSDP1
            with ``use_orig_params=False``, or the model is a module inside an FSDP1 model.

    Example:
        >>> groups = fusedopt.param_groups(model, weight_decay=0.1)
        >>> optimizer = fusedopt.FusedAdamW(groups, lr=3e-4, max_grad_norm=1.0)
    """
    _check(model, weight_decay)
    wide = _classes(fp32_state_for)
    decays: dict[nn.Parameter, bool] = {}
    of_wide: set[nn.Parameter] = set()
    exempt = _exempt(model)
    for module, name, dims, param in _owned_parameters(model):
        decay = param not in exempt and _decays(module, name, dims, decay_embeddings)
        decays[param] = decays.get(param, True) and decay
        if isinstance(module, wide):
            of_wide.add(param)
    groups: list[dict[str, Any]] = []
    for is_wide, extra in ((False, {}), (True, {"state_dtype": None})):
        for decay, number in ((True, weight_decay), (False, 0.0)):
            params = [p for p, d in decays.items() if d is decay and (p in of_wide) is is_wide]
            groups.append({"params": params, "weight_decay": number, **extra})
    return [group for group in groups if group["params"]]


def _classes(given: Any) -> tuple[type[nn.Module], ...]:
    classes = given if isinstance(given, tuple) else (given,)
    if not all(isinstance(each, type) and issubclass(each, nn.Module) for each in classes):
        raise TypeError(
            f"param_groups: fp32_state_for must be a class of modules or a tuple of them, got "
            f"{given!r}: use torch.nn.Embedding, say"
        )
    return classes


def _check(model: nn.Module, weight_decay: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: model must be a torch.nn.Module, got {type(model).__name__}: pass "
            "the module itself, `fusedopt.param_groups(model, 0.01)`, and not its parameters: only "
            "the module knows which are norms"
        )
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, Real):
        raise TypeError(
            f"param_groups: weight_decay must be a float, got {weight_decay!r}: "
            "pass a number of at least 0, such as `weight_decay=0.01`"
        )
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(
            f"param_groups: weight_decay must be at least 0 and finite, got {weight_decay!r}: "
            "pass `weight_decay=0.0` for no decay"
        )


def _owned_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, int, nn.Parameter]]:
    """Every (owner, name within the owner, number of dimensions, parameter).

    A tied parameter comes once per owner.
    """
    unflattened = _dims_before_fsdp(model)
    for path, module in model.named_modules():
        params = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        dims = {}
        for name, param in params.items():
            known = unflattened.get((module, name))
            dims[name] = _dims(f"{path}.{name}".lstrip("."), param) if known is None else known
        owner, originals_of, weight = f".{path}".rpartition(".parametrizations.")
        for name, param in params.items():
            if isinstance(module, parametrize.ParametrizationList) and originals_of:
                # the scale of weight_norm has fewer dimensions than the weight
                yield model.get_submodule(owner[1:]), weight, max(dims.values()), param
            else:
                yield module, name, dims[name], param


def _dims(label: str, param: nn.Parameter) -> int:
    """Dimensions of the whole parameter; this process may hold only a shard of it."""
    flat = getattr(param, "_fsdp_flattened", False)
    if not (flat or is_lazy(param)):
        whole: torch.Size | None = getattr(param, "ds_shape", None)  # DeepSpeed ZeRO-3
        return param.dim() if whole is None else len(whole)  # a nested tensor has no shape
    if not param.requires_grad:
        return 2  # its owner and its name decide
    if not flat:
        raise ValueError(
            f"param_groups: parameter {label!r} of a lazy module has no shape yet: "
            "run the model once before you make the groups: `model(inputs)`"
        )
    if getattr(param, "_is_flat_param", False):
        raise ValueError(
            f"param_groups: parameter {label!r} is weights and biases that FSDP made into one: "
            "wrap the model by `FullyShardedDataParallel(model, use_orig_params=True)`"
        )
    raise ValueError(
        f"param_groups: parameter {label!r} is a shard, and only its FSDP module knows the whole "
        "shape: give param_groups the FullyShardedDataParallel model, not a module inside it"
    )


def _dims_before_fsdp(model: nn.Module) -> dict[tuple[nn.Module, str], int]:
    """Dimensions of parameters that FSDP1 flattened (use_orig_params=True), by owner and name."""
    dims: dict[tuple[nn.Module, str], int] = {}
    for module in model.modules():
        flat: Any = getattr(getattr(module, "_handle", None), "flat_param", None)
        if not getattr(flat, "_is_flat_param", False):
            continue
        for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
            dims[info.module, info.param_name] = len(shape)
        for tied in flat._shared_param_infos:
            dims[tied.module, tied.param_name] = dims[tied.prim_module, tied.prim_param_name]
    return dims


def _exempt(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that the model itself asks to leave out of weight decay."""
    exempt = {param for param in model.parameters() if getattr(param, "_no_weight_decay", False)}
    for module in model.modules():
        patterns = _names_from(module, "no_weight_decay")
        keywords = _names_from(module, "no_weight_decay_keywords")
        if not (patterns or keywords):
            continue
        for wrapped_name, param in module.named_parameters(remove_duplicate=False):
            name = _OF_WRAPPERS.sub("", wrapped_name)
            if any(fnmatchcase(name, one) for one in patterns) or any(k in name for k in keywords):
                exempt.add(param)
    return exempt


def _names_from(module: nn.Module, method: str) -> list[str]:
    """The names that a method of the module returns; none if there is no such method."""
    ask = getattr(module, method, None)
    if not callable(ask):
        return []
    names: Any = ask()
    is_set = isinstance(names, Iterable) and not isinstance(names, str)
    listed: list[Any] = list(names) if is_set else [None]
    if not all(isinstance(name, str) for name in listed):
        raise TypeError(
            f"param_groups: {method}() of {type(module).__name__} must return a set of names, "
            f"got {names!r}: return {{'pos_embed'}}, say, or set() for none"
        )
    if "" in listed:
        raise ValueError(
            f"param_groups: {method}() of {type(module).__name__} must return names that are not "
            f"empty, got {names!r}: return set() for none"
        )
    return listed


def _decays(module: nn.Module, name: str, dims: int, decay_embeddings: bool) -> bool:
    if dims < 2 or not _BIAS_WORDS.isdisjoint(_words(name)):
        return False
    if _is_embedding(module):
        return decay_embeddings
    return not _is_norm(module)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _is_embedding(module: nn.Module) -> bool:
    scripted = {cls.__name__ for cls in _EMBEDDINGS}
    return isinstance(module, _EMBEDDINGS) or _scripted_class(module) in scripted


def _is_norm(module: nn.Module) -> bool:
    """By class where torch defines it, else by the last word that tells a norm from a layer."""
    if isinstance(module, _WEIGHT_LAYERS):
        return False
    if isinstance(module, _NORMS):
        return True
    scripted = _scripted_class(module)
    names = [cls.__name__ for cls in type(module).__mro__] if scripted is None else [scripted]
    for word in (word for name in names for word in reversed(_words(name))):
        if word.endswith("norm") or word in ("normalization", "normalisation"):
            return True
        if word in _LAYER_WORDS or word.removesuffix("s") in _LAYER_WORDS:
            return False
    return False


def _scripted_class(module: nn.Module) -> str | None:
    """Name of the class that a scripted or traced module was made from."""
    if not isinstance(module, torch.jit.ScriptModule):
        return None
    return getattr(module, "original_name", None)  # with PYTORCH_JIT=0 it has none
