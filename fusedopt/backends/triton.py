"""The Triton backend: the kernels of ``fusedopt/triton_kernels`` over the tables of a plan.

For GPUs that the CUDA module does not serve: AMD's, or any if the build found no nvcc. Kernels are
compiled when a plan is made, or taken from Triton's cache. They are launched without the JIT's
search for a variant. The table of inputs is copied from pinned memory when it has changed.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .device import DeviceBackend, DeviceTables
from .driver import Driver, DriverOnDemand, Launches
from .records import EXACT, GRAD, STEP

OLDEST = (3, 6)  # release of Triton
OLDEST_ON_AMD = (3, 7)  # older ones round the square root of tiny numbers incorrectly

# Pinned buffers of the inputs, made with the plan: later pinning may wait for the device.
BUFFERS = 32
SPARE = 4  # kept for captures, which may not pin memory

FLAGS_AT = {name: offset for name, offset, *_ in STEP.fields}["flags"]  # in the table of inputs

Launch = Callable[[int, int], None]  # programs, stream
Key = tuple[Any, ...]  # of a variant: the fields of triton_kernels.variants.Variant


class TritonDriver(Driver):
    """Runs kernels by Triton's own driver, on the GPUs that torch sees."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, Key], Any] = {}

    def launches(self, tables: DeviceTables) -> Launches:
        return TritonLaunches(self, tables)

    def launcher(self, device: torch.device, variant: Key, values: dict[str, int]) -> Launch:
        """A function that launches one variant, with arguments bound; compiles it if need be.

        Raises:
            RuntimeError: it cannot be compiled or loaded.
        """
        index = self.index(device)
        if (index, variant) not in self._kernels:
            with torch.cuda.device(index):
                self._kernels[index, variant] = self._load(variant)
        kernel = self._kernels[index, variant]
        arguments = [values.get(name, 0) for name in kernel.src.fn.arg_names]  # 0 for constants
        run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata

        def launch(programs: int, stream: int) -> None:
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    return launch(programs, stream)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

        return launch

    def _load(self, key: Key) -> Any:
        from ..triton_kernels.variants import Variant, compiled

        variant = Variant(*key)
        try:
            kernel = compiled(variant, _target())
            _ = kernel.run  # loads it on the current device: now, and not while a graph is captured
        except Exception as error:  # Triton's own, LLVM's, ptxas's, a C compiler's
            raise RuntimeError(
                f"fusedopt: Triton cannot compile {variant.name} for this GPU: {error}; "
                "use `backend='reference'` (plain torch operations)"
            ) from error
        return kernel

    def reduce_programs(self, device: torch.device) -> int:
        """As many warps of ``reduce`` as may be resident."""
        return 32 * torch.cuda.get_device_properties(device).multi_processor_count

    def event(self, device: torch.device) -> Any:
        """An event after all work that is now in the device's current stream."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event


class _Upload:
    """Copies the table of inputs to its device without waiting. A buffer is reused once the copy
    from it is over; a buffer that a graph copies from is never reused."""

    def __init__(self, driver: TritonDriver, tables: DeviceTables) -> None:
        self._driver = driver
        self._device = tables.device
        self._source = tables.host_inputs
        self._target = tables.tensors["inputs"]
        self._written = b""  # the device's contents; empty where unknown
        self._free = [self._new_buffer() for _ in range(BUFFERS)]
        self._busy: list[tuple[Tensor, Any]] = []
        self._captured: list[Tensor] = []

    def _new_buffer(self) -> Tensor:
        return self._driver.host_buffer(len(self._source))

    def due(self, capturing: bool) -> bool:
        """True after a capture: replays write the table, too, so its contents are unknown."""
        return capturing or bool(self._captured) or self._source != self._written

    def run(self, capturing: bool) -> None:
        if not capturing:
            self._reclaim()
        buffer = self._free.pop() if self._free else self._new_buffer()
        now = bytes(self._source)
        ctypes.memmove(buffer.data_ptr(), now, len(now))
        self._written = b""
        self._target.copy_(buffer, non_blocking=True)
        if capturing:
            self._captured.append(buffer)
            return
        self._busy.append((buffer, self._driver.event(self._device)))
        while len(self._free) < SPARE:
            self._free.append(self._new_buffer())
        self._written = now  # last: after an error the next step writes again

    def _reclaim(self) -> None:
        over = [event.query() for _, event in self._busy]
        self._free += [buffer for buffer, _ in compress(self._busy, over)]
        self._busy = [entry for entry, is_over in zip(self._busy, over, strict=True) if not is_over]


class TritonLaunches:
    """The kernels over the tables of one device."""

    def __init__(self, driver: TritonDriver, tables: DeviceTables) -> None:
        self._driver, self._device, self._arguments = driver, tables.device, tables.arguments
        self._upload = _Upload(driver, tables)
        self._host_inputs = tables.host_inputs
        codec_at = {name: offset for name, offset, *_ in GRAD.fields}["codec"]
        self._grad_codecs = slice(tables.grads_at + codec_at, None, GRAD.size)  # their low bytes
        halves = "any" if tables.half_params else "float32"
        self._streams_at_least = "coded" if tables.coded else halves
        self._programs = max(1, tables.arguments["n_chunks"])
        self._reduce_programs = min(self._programs, driver.reduce_programs(tables.device))
        rule = tables.rule
        self._rule = rule.name
        self._verb = self._verb_now()
        self._reduce = self._launcher(self._verb, rule.name)
        self._finalize = self._launcher("finalize", rule.name)
        self._of_update = ("update", rule.name, max(tables.n_states, rule.fewest_states))
        self._streams = self._streams_now()
        self._update = self._launcher(*self._of_update, self._streams)
        self._stream = 0
        self.updates = 0

    def _launcher(self, *variant: Any) -> Launch:
        return self._driver.launcher(self._device, variant, self._arguments)

    def _streams_now(self) -> str:
        """Which streams may not be fp32: see STREAMS in triton_kernels/update.py."""
        if self._streams_at_least == "float32" and any(self._host_inputs[self._grad_codecs]):
            return "any"
        return self._streams_at_least

    def _verb_now(self) -> str:
        (flags,) = struct.unpack_from("=Q", self._host_inputs, FLAGS_AT)
        return "reduce_exactly" if flags & EXACT else "reduce"

    def begin(self, stream: int, capturing: bool) -> None:
        self._stream = stream
        if not self._upload.due(capturing):
            return
        streams, verb = self._streams_now(), self._verb_now()
        # If any of this fails, the old table and the old variant that reads it stay.
        same = streams == self._streams
        update = self._update if same else self._launcher(*self._of_update, streams)
        same = verb == self._verb
        reduce = self._reduce if same else self._launcher(verb, self._rule)
        self._upload.run(capturing)
        self._update, self._streams = update, streams
        self._reduce, self._verb = reduce, verb

    def reduce(self) -> None:
        self._reduce(self._reduce_programs, self._stream)

    def finalize(self) -> None:
        self._finalize(1, self._stream)

    def update(self) -> None:
        self._update(self._programs, self._stream)
        self.updates += 1


driver = DriverOnDemand("Triton", TritonDriver, lambda: unavailable_reason())


def unavailable_reason() -> str | None:
    """Why GPU tensors cannot be served, or ``None``."""
    if driver.made is not None:
        return None
    try:
        import triton

        version = triton.__version__
    except Exception as error:  # of any kind: a broken installation
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed: pip install triton"
        return f"Triton cannot be imported: {_one_line(error)}"
    if not is_supported(version):
        return (
            f"Triton {version} is too old: upgrade it to {'.'.join(map(str, _oldest()))} or newer"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        _target()
    except Exception as error:  # of any kind: no C compiler for its launcher, two vendors' drivers
        return f"Triton {version} cannot use this GPU: {_one_line(error)}"
    return None


def is_supported(version: str) -> bool:
    """Whether a Triton of this version, say ``3.10.0a1`` or ``3.6.0+git1234``, is new enough."""
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) >= _oldest()


def _oldest() -> tuple[int, int]:
    return OLDEST if torch.version.hip is None else OLDEST_ON_AMD


def _target() -> Any:
    """The target that Triton compiles for on this machine."""
    from triton.runtime import driver as runtime

    return runtime.active.get_current_target()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def details() -> dict[str, Any]:
    """For the environment report."""
    told = {}
    with suppress(Exception):  # unavailable_reason says what is wrong
        import triton

        told["version"] = triton.__version__
        target = _target()
        told["target"] = f"{target.backend} {target.arch}"
    return told


class TritonBackend(DeviceBackend):
    """Kernels of ``fusedopt/triton_kernels``."""

    name = "triton"

    def __init__(self) -> None:
        super().__init__(driver())
