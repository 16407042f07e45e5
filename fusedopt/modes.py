"""torch's modes: those that the step refuses, and how allocations are kept out of them.

The kernels bypass torch's dispatcher. So a mode that traces, fakes or transforms torch's operations
would see a step that changes nothing, or the kernels would write to memory that does not exist.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

_PRE_DISPATCH = DispatchKey.PreDispatch  # looking up the member would take as long as the query
F = TypeVar("F", bound=Callable[..., Any])

NOT_TRACED = (
    "the fused step is not traced: its kernels run between two graphs. Call it outside of the "
    "compiled function, or compile without fullgraph=True"
)


def marked_untraced(function: F) -> F:
    """Keep Dynamo from tracing ``function`` and callees; with fullgraph=True it gives our reason.

    A trace would lose what the function stores in an optimizer. The public
    ``torch.compiler.disable`` imports all of Dynamo at once, and costs each call some microseconds,
    compiled or not. The attributes are those that it would set; the rest marks the code object.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = NOT_TRACED
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)  # the function, its callees
    set_code_exec_strategy(marked.__code__, skip)
    return function


def untraced(function: F) -> F:
    """``marked_untraced`` behind a call that Dynamo traces. So where ``function`` itself is
    compiled with fullgraph=True, Dynamo refuses before the call and not after it."""
    marked_untraced(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return cast(F, call)


def _find_has_callbacks() -> Callable[[], bool]:
    """torch's ``at::hasCallbacks()`` (ATen/record_function.h), which has no Python binding."""
    for library in Path(torch.__file__).parent.glob("lib/*torch_cpu.*"):
        for symbol in ("_ZN2at12hasCallbacksEv", "?hasCallbacks@at@@YA_NXZ"):  # Windows: the second
            with suppress(OSError, AttributeError):
                found = ctypes.PyDLL(str(library))[symbol]
                found.restype, found.argtypes = ctypes.c_bool, ()
                return found
    return lambda: True


# Whether this thread's ranges are recorded: by a profiler, or by an ExecutionTraceObserver, which
# Python cannot see. Entering a range costs half a step, even if nothing records it.
is_recorded = _find_has_callbacks()


@contextmanager
def durable() -> Iterator[None]:
    """For tensors that outlive the current modes: one made in inference mode could not be written
    to outside of it, and one made in a FakeTensorMode has no memory."""
    with torch.inference_mode(False), _disable_current_modes():
        yield


def refuse_tracing() -> None:
    """Raise ``RuntimeError``, naming the mode, where the step could not be traced or not be run."""
    traced, transformed = _get_tracing_state(), peek_interpreter_stack() is not None
    before_dispatch = _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    if not (_len_torch_dispatch_stack() or traced or transformed or before_dispatch):
        return
    # FakeTensorMode, make_fx and functionalization have a key; other modes only observe.
    modes = _get_current_dispatch_mode_stack()
    active = [type(m).__name__ for m in modes if getattr(m, "_mode_key", None) is not None]
    others = {
        "make_fx with pre_dispatch=True": before_dispatch,
        "torch.jit.trace": traced,
        "a transform of torch.func (vmap, grad, functionalize)": transformed,
    }
    active += [name for name, is_on in others.items() if is_on]
    if active:
        raise RuntimeError(
            f"the fused step cannot be traced or faked, and {active[-1]} is active; call "
            "`optimizer.step()` outside of it, or use an optimizer of torch.optim there"
        )
