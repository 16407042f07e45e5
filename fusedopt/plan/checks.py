"""Which parameters and gradients a step can use, and the messages that refuse the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..rules.declaration import Group
from .local import is_dtensor, local_of, same_sharding
from .memory import overlaps_itself

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of params and gradients


def is_served(param: Tensor) -> bool:
    """Whether a step may touch ``param``: frozen parameters without gradient are left alone,
    whatever their dtype and layout."""
    return param.requires_grad or param.grad is not None


def served_params(groups: list[Group]) -> Iterator[Tensor]:
    return (param for group in groups for param in group["params"] if is_served(param))


def is_of_inference(tensor: Tensor) -> bool:
    """Whether ``tensor`` may be written to only in inference mode.

    ``is_inference()`` is wrong once ``tensor.data`` has been assigned.
    """
    try:
        return tensor._version < 0
    except RuntimeError:
        return True


def check_param(label: str, param: Tensor) -> None:
    """Raise ``TypeError`` for a parameter no backend can update."""
    if is_dtensor(param):
        if any(placement.is_partial() for placement in param.placements):  # type: ignore[attr-defined]
            raise TypeError(
                f"{label}: its placements are {tuple(param.placements)}, "  # type: ignore[attr-defined]
                "and a parameter that is a partial sum has no values of its own; replicate it: "
                "`param = torch.nn.Parameter(param.detach().redistribute(placements=["
                "torch.distributed.tensor.Replicate()] * param.device_mesh.ndim))`"
            )
        param = local_of(param)
    wrapper: object = param  # mypy takes the guard below for impossible
    if param.is_nested:
        raise TypeError(
            f"{label}: nested parameters are not supported; pad it: `param = torch.nn.Parameter("
            "torch.nested.to_padded_tensor(param.detach(), 0.0))`"
        )
    if is_traceable_wrapper_subclass(wrapper):
        raise TypeError(
            f"{label}: {type(wrapper).__name__} is not supported, its memory is not its values; "
            "freeze it (`param.requires_grad_(False).grad = None`), or give it to another "
            "optimizer (`optimizer = torch.optim.AdamW([param])`)"
        )
    if param.layout != torch.strided:
        raise TypeError(
            f"{label}: sparse parameters (layout {param.layout}) are not supported; "
            "use a dense one: `param = torch.nn.Parameter(param.detach().to_dense())`"
        )
    if param.is_complex():
        raise TypeError(
            f"{label}: complex parameters ({param.dtype}) are not supported; "
            "keep it as real numbers, `param = torch.nn.Parameter(torch.view_as_real("
            "param.detach()))`, and use torch.view_as_complex(param) in forward()"
        )
    if param.dtype not in DTYPES:
        raise TypeError(
            f"{label}: parameter dtype {param.dtype} is not supported; use float32, float16, "
            "bfloat16 or float64: `param.data = param.data.float()`"
        )


def check_memory(label: str, param: Tensor) -> None:
    """Raise ``RuntimeError`` for a parameter that has no memory of its own."""
    param = local_of(param)
    if is_lazy(param):
        raise RuntimeError(
            f"{label} is not initialized; run a forward pass through the lazy module first: "
            "`model(inputs)`"
        )
    if isinstance(param, FakeTensor):
        raise RuntimeError(
            f"{label} is a FakeTensor, which has no memory; make model and optimizer outside "
            "of the FakeTensorMode"
        )
    if param.device.type == "meta":
        raise RuntimeError(
            f"{label} is on the meta device; materialize the model before you make the "
            "optimizer: `model.to_empty(device='cpu')`, and load its weights"
        )
    if param.numel() > 0 and param.data_ptr() == 0:
        raise RuntimeError(
            f"{label} has no memory (a zero tensor without storage, or a storage that was "
            "resized to nothing); give it values before step(): `param.data = values`"
        )
    if overlaps_itself(param):
        raise RuntimeError(
            f"{label}: elements share memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}); give it memory of its own: `param.data = param.detach().clone()`"
        )


def check_grad(label: str, param: Tensor, grad: Tensor) -> None:
    """Raise ``RuntimeError`` unless ``grad`` is a gradient that a step on ``param`` can use."""
    if is_dtensor(param) != is_dtensor(grad):
        raise RuntimeError(
            f"{label}: the gradient is a {type(grad).__name__} and the parameter a "
            f"{type(param).__name__}; both have to be DTensors of one mesh, or plain tensors; drop "
            "the gradient: `param.grad = None`"
        )
    if is_dtensor(grad):
        if grad.device_mesh != param.device_mesh or grad.shape != param.shape:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{label}: gradient has shape {tuple(grad.shape)} on {grad.device_mesh}, "  # type: ignore[attr-defined]
                f"parameter has {tuple(param.shape)} on {param.device_mesh}; "  # type: ignore[attr-defined]
                "clear it after resharding the parameter: `param.grad = None`"
            )
        if not same_sharding(grad, param):
            return  # it is redistributed, and has the parameter's layout then
        param, grad = local_of(param), local_of(grad)
    wrapper: object = grad  # mypy takes the guard below for impossible
    if is_traceable_wrapper_subclass(wrapper):
        raise RuntimeError(
            f"{label}: gradients of type {type(wrapper).__name__} are not supported, their memory "
            "is not their values; assign a plain tensor, or none: `param.grad = None`"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{label}: fusedopt does not support sparse gradients (layout {grad.layout}); "
            "create the module with sparse=False, or `param.grad = param.grad.to_dense()`"
        )
    freed = grad.untyped_storage().nbytes() == 0 and not grad._is_zerotensor()
    if grad.numel() > 0 and freed and grad.device.type != "meta":
        raise RuntimeError(
            f"{label}: the gradient's storage was resized to nothing; set `param.grad = None`, or "
            "run backward() again"
        )
    narrowed = grad.dtype == torch.float64 and param.dtype != torch.float64
    if grad.dtype not in DTYPES or narrowed:
        raise RuntimeError(
            f"{label}: gradient dtype {grad.dtype} does not go with parameter dtype {param.dtype}; "
            "convert it: `param.grad = param.grad.to(param.dtype)`"
        )
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{label}: gradient has shape {tuple(grad.shape)} on {grad.device}, parameter has "
            f"{tuple(param.shape)} on {param.device}; clear it after replacing the parameter's "
            "data: `param.grad = None`"
        )
