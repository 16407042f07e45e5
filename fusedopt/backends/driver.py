"""How the GPU backends reach a device: its kernels, its streams, and memory of the host."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .records import address


class Launches(Protocol):
    """The kernels over the tables of one device. Errors are ``RuntimeError`` and change nothing."""

    def begin(self, stream: int, capturing: bool) -> None:
        """Called before the launches of a step: copies the table of inputs to the device if it has
        changed, and always during graph capture."""

    def reduce(self) -> None:
        """If no other device and no rank has words to add, the last block also finalizes."""

    def finalize(self) -> None: ...

    def update(self) -> None: ...

    @property
    def updates(self) -> int:
        """Launches of ``update`` that did not fail, so far."""


class HostWords:
    """Integers in memory of the host, in which kernels tell the host something without a copy.

    They are kept forever: a kernel that writes to one may still be on its way.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._pages: list[Tensor] = []
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def taken_over(self, word: Tensor | None) -> Tensor:
        """``word`` if it is one of these, otherwise a new one of the same value."""
        if word is not None and any(lies_in(word, page) for page in self._pages):
            return word
        with self._lock:  # optimizers of several threads
            if not self._free:
                self._pages.append(self._driver.host_buffer(4096).zero_().view(torch.int32))
                self._free = list(self._pages[-1].view(-1, 1).unbind())
            new = self._free.pop()
        return new if word is None else new.copy_(word)


def lies_in(part: Tensor, whole: Tensor) -> bool:
    return 0 <= address(part) - address(whole) < whole.nbytes


class Driver(ABC):
    """A way to run kernels on torch's devices of one type."""

    device_type = "cuda"  # of ROCm, too
    pins = True  # pin host memory: copies from it are asynchronous, and kernels can write to it

    @abstractmethod
    def launches(self, tables: Any) -> Launches:
        """Of the ``DeviceTables`` of one device.

        Raises:
            RuntimeError: the device cannot run them.
        """

    def stream(self, device: torch.device) -> int:
        stream: int = torch.cuda.current_stream(device).cuda_stream
        return stream

    def capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def record_stream(self, tensor: Tensor, device: torch.device) -> None:
        """Tell the allocator not to reuse ``tensor`` before the current stream is done with it."""
        tensor.record_stream(torch.cuda.current_stream(device))

    @property
    def host_words(self) -> HostWords:
        words: HostWords = vars(self).setdefault("_host_words", HostWords(self))  # of one thread
        return words

    def host_buffer(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=self.pins)

    def index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index


class DriverOnDemand:
    """The driver of this machine's GPUs, created by the first call."""

    def __init__(
        self, title: str, make: Callable[[], Driver], reason: Callable[[], str | None]
    ) -> None:
        self._title, self._make, self._reason = title, make, reason
        self.made: Driver | None = None

    def __call__(self) -> Driver:
        """
        Raises:
            RuntimeError: there is none; the message says why.
        """
        if self.made is None:
            reason = self._reason()
            if reason is not None:
                raise RuntimeError(f"the {self._title} backend is not available ({reason})")
            self.made = self._make()
        return self.made
