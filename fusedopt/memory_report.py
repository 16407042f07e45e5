"""``python -m fusedopt memory``: what training takes with each precision of state, as a table."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .estimate import estimate_memory
from .optimizer import FusedOptimizer

OPTIMIZERS = {cls.rule.name: cls for cls in FusedOptimizer.__subclasses__()}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of the dtypes in a file of safetensors; others are no parameters that can be trained.
_OF_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=count, metavar="N", help="parameters, such as 350M or 1.5B")
    what.add_argument(
        "model",
        nargs="?",
        help="a .safetensors file, a file of torch.save, or module:function that makes a model",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters; default: as they are")
    parser.add_argument("--budget", type=size, metavar="SIZE", help="memory, such as 8G (GiB)")
    parser.add_argument(
        "--activations", type=size, default=0, metavar="SIZE", help="what else is there at the peak"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--momentum", type=float, default=0.9, help="of sgd; default: 0.9")
    parser.add_argument("--json", action="store_true", help="for programs; sizes in bytes")


def count(text: str) -> int:
    return _scaled(text, _COUNTS, "a number of parameters, such as 350M or 1.5B")


def size(text: str) -> int:
    return _scaled(text.upper().removesuffix("IB").removesuffix("B"), _SIZES, "a size, such as 8G")


def _scaled(text: str, units: dict[str, int], wanted: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Z]?)", text.upper())
    if found is None or found[2] not in units or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return round(float(found[1]) * units[found[2]])


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Returns 1 if there is a budget and no mode fits it."""
    params = list(parameters(arguments))
    if not params:
        raise SystemExit(f"{arguments.model} has no parameters that can be trained")
    options: dict[str, Any] = {"max_grad_norm": 1.0}  # whose sweep over the gradients counts
    if arguments.optimizer == "sgd":
        options["momentum"] = arguments.momentum
    estimate = estimate_memory(
        params,
        OPTIMIZERS[arguments.optimizer],
        budget=arguments.budget,
        activations=arguments.activations,
        device="cuda",
        **options,
    )
    best = estimate.best()
    if arguments.json:
        rows = [
            {**vars(mode), "peak": mode.peak, "fits": mode.fits, "fidelity": mode.fidelity}
            for mode in estimate.modes
        ]
        print(json.dumps(rows, indent=2))
    else:
        print(estimate)
        if arguments.budget is not None:
            name = OPTIMIZERS[arguments.optimizer].__name__
            chosen = {} if best is None else {**options, **best.arguments}
            words = "".join(f", {k}={v!r}" for k, v in chosen.items())
            print(f"\n{name}(params{words})" if best is not None else "\nnone of these fits")
    return int(arguments.budget is not None and best is None)


def parameters(arguments: argparse.Namespace) -> Iterator[Tensor]:
    """On the meta device, in the dtype that was asked for."""
    dtype = DTYPES.get(arguments.dtype)
    if arguments.params is not None:
        found: Iterator[Tensor] = iter([_meta((arguments.params,), dtype or torch.float32)])
    elif Path(arguments.model).is_file():
        found = of_file(Path(arguments.model))
    else:
        found = made_by(arguments.model)
    for p in found:
        yield _meta(p.shape, dtype or p.dtype, p.requires_grad)


def _meta(shape: Any, dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def of_file(path: Path) -> Iterator[Tensor]:
    """The floating-point tensors of a checkpoint. Reads no values."""
    try:
        found = _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)
    except (ValueError, KeyError, OSError, RuntimeError, struct.error, UnpicklingError) as error:
        raise SystemExit(
            f"{path} cannot be read as tensors ({type(error).__name__}); give a file of "
            "safetensors, one of torch.save(model.state_dict()), or module:function that makes "
            "the model"
        ) from error
    return iter(found)


def _of_safetensors(path: Path) -> list[Tensor]:
    with path.open("rb") as file:
        (n_bytes,) = struct.unpack("<Q", file.read(8))
        if n_bytes > path.stat().st_size:
            raise ValueError(n_bytes)
        header = json.loads(file.read(n_bytes))
    return [
        _meta(entry["shape"], _OF_SAFETENSORS[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _OF_SAFETENSORS
    ]


def _of_torch(path: Path) -> list[Tensor]:
    state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    for name in ("state_dict", "model_state_dict", "model"):  # of whole checkpoints
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    tensors = state.values() if isinstance(state, Mapping) else [state]
    distinct = {id(t): t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
    return [_meta(tensor.shape, tensor.dtype) for tensor in distinct.values()]


def made_by(name: str) -> Iterator[Tensor]:
    """The parameters of the model that ``module:function`` makes, on the meta device."""
    module, colon, function = name.partition(":")
    if not colon:
        raise SystemExit(f"{name!r} is no file; name a file, or module:function that makes a model")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{name!r} cannot be imported: {error}") from error
    with torch.device("meta"):
        model = make()
    if not isinstance(model, nn.Module):
        raise SystemExit(f"{name}() made a {type(model).__name__}, not a torch.nn.Module")
    return model.parameters()
