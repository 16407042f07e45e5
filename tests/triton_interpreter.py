"""The Triton backend on a machine without a GPU: its kernels in Triton's interpreter.

``installed()`` makes the interpreter the driver of ``fusedopt.backends.triton``: CPU tensors are
then served by ``backend="triton"``. The kernels are imported a second time for that, under another
name: Triton decides at the import whether it interprets a kernel or compiles it.

The interpreter is numpy, whose float32 and float64 operations are those of IEEE 754, and so gives
the bits that a GPU gives. Where it does not by itself, it is patched:

- fma rounds twice in Triton 3.6 to 3.8: ``exact.fma`` takes its place, which rounds once.
- The payload and the sign of a NaN are numpy's own. That is the one thing left that differs, and it
  is not part of the contract (``gpu_twins.with_one_nan``): nothing has to be bounded at one ulp.

Two things that a GPU does not forgive show here as well: an access through a pointer that is less
aligned than promised goes elsewhere, and on demand (``Interpreter.memory``) one to anything but
known tensors is an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models import exact
from torch import Tensor
from triton_memory import Memory

import fusedopt
from fusedopt.backends import triton as backend

PACKAGE = Path(fusedopt.__file__).parent / "triton_kernels"
NAME = "interpreted_triton_kernels"
BLOCK = 1024  # elements of a whole block of update, at this size of a warp


@functools.cache
def kernels() -> ModuleType:
    """``fusedopt.triton_kernels.variants`` with every kernel interpreted."""
    return load(PACKAGE, NAME)


def part(name: str) -> ModuleType:
    """One of the interpreted modules."""
    kernels()
    return sys.modules[f"{NAME}.{name}"]


def load(folder: Path, name: str) -> ModuleType:
    """The interpreted kernels of ``folder``, imported as the package ``name``."""
    with interpreted_imports():
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
        return importlib.import_module(f"{name}.variants")


@contextlib.contextmanager
def interpreted_imports() -> Iterator[None]:
    """Kernels that are defined meanwhile are interpreted."""
    import triton

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


# ---- patches ------------------------------------------------------------------------------------


@functools.cache
def interpreted_library() -> dict[str, Any]:
    """The functions of Triton's own library that kernels call: they, too, were made to compile."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return {name: InterpretedFunction(getattr(tl, name).fn) for name in ("max", "sum")}


def _splat(builder: Any, shape_type: Any, scalar: Any) -> Any:
    """The interpreter's own would make integers of the answer to a comparison, which that of
    Triton 3.9 then refuses as a mask."""
    from triton.runtime.interpreter import TensorHandle

    values = np.full(shape_type.shape, scalar.data, dtype=scalar.data.dtype)
    return TensorHandle(values, scalar.dtype.scalar)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    assert z.data.dtype == np.float32
    return TensorHandle(exact.fma(x.data, y.data, z.data), z.dtype.scalar)


@functools.cache
def rounds_once() -> bool:
    """Whether the interpreter's own fma does."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    def handle(value: float) -> Any:
        return TensorHandle(np.array([value], np.float32), tl.float32)

    # Just below a tie; on it, and then up, if the product or a float64 sum is rounded before.
    operands = (1 + 2.0**-23, 2.0**-24 * (1 - 2.0**-23), 1 + 2.0**-23)
    found = interpreter_builder.create_fma(*map(handle, operands)).data.item()
    return bool(found == 1 + 2.0**-23)


@contextlib.contextmanager
def _language_interprets() -> Iterator[None]:
    """``triton.language`` interprets, from the first call on and until the end.

    Triton itself patches it at every call of a function in a kernel, most of the time it takes, and
    does not undo all of it.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    nothing = interpreter._LangPatchScope()  # for a launch to restore
    scopes: dict[bool, Any] = {}

    def patch_once(function: Any) -> Any:
        by_library = function.__globals__.get("core") is tl.core  # of Triton; or by a kernel
        if by_library not in scopes:
            scopes[by_library] = scope = patch_lang(function)
            scope.set_attr(tl, "multiple_of", _multiple_of)
            scope.set_attr(tl.tensor, "__index__", _index)
        return nothing

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


def _multiple_of(pointer: Any, multiple: Any) -> Any:
    """A promise. Where it is broken, a GPU may read and write elsewhere, and this does."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    data = pointer.handle.data
    kept = TensorHandle(data - data % np.uint64(multiple), pointer.handle.dtype)
    return tl.tensor(kept, pointer.type)


def _index(scalar: Any) -> int:
    """The own of Triton 3.6 needs a numpy before 2.4."""
    return int(scalar.handle.data.item())


def _of_its_value(constant: Any, name: str) -> Any:
    """The compiler, too, finds attributes of a constant's value: the fields of a record."""
    return getattr(constant.__dict__["value"], name)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """For the time of one launch."""
    from triton.runtime.interpreter import InterpreterBuilder

    patches = (
        {"create_splat": _splat} if rounds_once() else {"create_splat": _splat, "create_fma": _fma}
    )
    with (
        mock.patch("triton.language.constexpr.__getattr__", _of_its_value, create=True),
        mock.patch.multiple("triton.language", **interpreted_library()),
        mock.patch.multiple(InterpreterBuilder, **patches),
        _language_interprets(),
        np.errstate(all="ignore"),
    ):
        yield


def call(function: Any, *arguments: Any, length: int = 1) -> Any:
    """``function`` of a kernel on numpy arrays, all of one length, and numpy scalars.

    Returns arrays of that length, or of ``length`` where there is none.
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    names = ("float32", "float64", "int32", "int64", "uint8", "uint16", "uint32")
    types = {np.dtype(bool): tl.int1, **{np.dtype(name): getattr(tl, name) for name in names}}

    n = max((a.size for a in arguments if isinstance(a, np.ndarray)), default=length)
    length = 1 << (n - 1).bit_length()  # blocks have no other lengths

    def into(value: Any) -> Any:
        if isinstance(value, tuple):
            made = [into(one) for one in value]
            return type(value)(*made) if hasattr(value, "_fields") else tl.tuple(made)
        if isinstance(value, np.ndarray):
            kind = types[value.dtype]
            handle = TensorHandle(np.resize(value, length), kind)
            return tl.tensor(handle, tl.block_type(kind, [length]))
        if isinstance(value, np.generic):
            kind = types[value.dtype]
            return tl.tensor(TensorHandle(np.array([value]), kind), kind)
        return value

    def out(value: Any) -> Any:
        if isinstance(value, (tuple, tl.tuple)):
            return tuple(out(one) for one in value)
        if isinstance(value, int):  # the same for all
            return np.full(n, value)
        return value.handle.data[:n]

    with interpreting():
        return out(function(*map(into, arguments)))


@contextlib.contextmanager
def in_order(order: Sequence[int]) -> Iterator[None]:
    """The programs of a launch run in this order."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_index = InterpreterBuilder.set_grid_idx

    def set_other(builder: Any, x: int, y: int, z: int) -> None:
        set_index(builder, order[x], y, z)

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", set_other):
        yield


# ---- the driver ---------------------------------------------------------------------------------


def _int64(value: int) -> Any:
    """As kernels are compiled. Triton itself takes a number that fits for one of 32 bits, and where
    Python is no position-independent program (Debian's) an address on its heap does fit."""
    from triton.language import int64, tensor
    from triton.runtime.interpreter import TensorHandle

    return tensor(TensorHandle(np.array([value], np.int64), int64), int64)


class _Done:
    def query(self) -> bool:
        return True


class Interpreter(backend.TritonDriver):
    """Runs every program of a grid in turn, on CPU tensors; keeps a list of the launches."""

    device_type = "cpu"
    pins = False

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, int]] = []
        self.programs = 3  # of reduce, if there are as many chunks
        self.order: Callable[[int], Sequence[int]] = range  # of the programs of a launch
        self.memory: Memory | None = None  # if set, all that kernels may touch

    def launcher(
        self, device: torch.device, variant: backend.Key, values: dict[str, int]
    ) -> backend.Launch:
        variant, counts = kernels().Variant(*variant), kernels().COUNTS
        names = variant.kernel.arg_names
        constants = variant.constants
        arguments = {name: values[name] for name in names if name not in constants}

        def launch(programs: int, stream: int) -> None:
            self.launched.append((variant.name, programs))
            watched = contextlib.nullcontext() if self.memory is None else self.memory.watched()
            with interpreting(), in_order(self.order(programs)), watched:
                wide = {n: v if n in counts else _int64(v) for n, v in arguments.items()}
                variant.kernel[(programs,)](**wide, **constants)

        return launch

    def reduce_programs(self, device: torch.device) -> int:
        return self.programs

    def event(self, device: torch.device) -> Any:
        return _Done()

    def stream(self, device: torch.device) -> int:
        return 0

    def capturing(self, device: torch.device) -> bool:
        return False

    def index(self, device: torch.device) -> int:
        return 0

    def record_stream(self, tensor: Tensor, device: torch.device) -> None:
        pass


@contextlib.contextmanager
def installed() -> Iterator[Interpreter]:
    """``backend="triton"`` serves CPU tensors in the interpreter."""
    before, interpreter = backend.driver.made, Interpreter()
    backend.driver.made = interpreter
    try:
        yield interpreter
    finally:
        backend.driver.made = before


def fixture() -> Iterator[Interpreter]:
    """Body of a pytest fixture."""
    pytest.importorskip("triton")
    with installed() as interpreter:
        yield interpreter
