"""The Triton backend on a machine without a GPU: its kernels in Triton's interpreter.

``installed()`` makes the interpreter the driver of ``fusedopt.backends.triton``, so that CPU tensors
are served by ``backend="triton"``. The kernels are imported a second time for that, under another
name: Triton decides at the import whether it interprets a kernel or compiles it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt.backends import triton as backend

PACKAGE = Path(fusedopt.__file__).parent / "triton_kernels"
NAME = "interpreted_triton_kernels"
WARP_SIZE = 32


@functools.cache
def kernels() -> ModuleType:
    """``fusedopt.triton_kernels.variants`` with every kernel interpreted."""
    import triton

    spec = importlib.util.spec_from_file_location(
        NAME, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(package)
        return importlib.import_module(f"{NAME}.variants")


@functools.cache
def interpreted_library() -> dict[str, Any]:
    """The functions of Triton's own library that kernels call: they, too, were made to compile."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return {name: InterpretedFunction(getattr(tl, name).fn) for name in ("max", "sum")}


def _splat(builder: Any, shape_type: Any, scalar: Any) -> Any:
    """The interpreter's own would make integers of the answer to a comparison, which it then
    refuses as a mask."""
    from triton.runtime.interpreter import TensorHandle

    values = numpy.full(shape_type.shape, scalar.data, dtype=scalar.data.dtype)
    return TensorHandle(values, scalar.dtype.scalar)


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    with (
        unittest.mock.patch.multiple("triton.language", **interpreted_library()),
        unittest.mock.patch.object(InterpreterBuilder, "create_splat", _splat),
    ):
        yield


class _Done:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Interpreter(backend.TritonDriver):
    """Runs every program of a grid in turn, on CPU tensors; keeps a list of the launches."""

    device_type = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, int]] = []

    def launcher(
        self, device: torch.device, verb: str, rule: str, halves: bool, values: dict[str, int]
    ) -> backend.Launch:
        variant = kernels().Variant(verb, rule, halves)
        names = variant.kernel.arg_names
        constants = variant.constants(WARP_SIZE)
        arguments = {name: values[name] for name in names if name not in constants}

        def launch(programs: int, stream: int) -> None:
            self.launched.append((variant.name, programs))
            with _interpreting():
                variant.kernel[(programs,)](**arguments, **constants)

        return launch

    def reduce_programs(self, device: torch.device) -> int:
        return 3

    def host_buffer(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

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
    before, interpreter = backend._driver, Interpreter()
    backend._driver = interpreter
    try:
        yield interpreter
    finally:
        backend._driver = before


def fixture() -> Iterator[Interpreter]:
    """Body of a pytest fixture."""
    pytest.importorskip("triton")
    with installed() as interpreter:
        yield interpreter
