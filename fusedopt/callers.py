"""Who has called us: a line of the user's code for a warning, or a function or object of torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

OURS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__)))


def running(method: Callable[..., Any]) -> Any:
    """The ``self`` of the innermost call of ``method`` that has led here; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not method.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def users_level() -> int:
    """``stacklevel`` for a ``warnings.warn`` in the caller.

    It leads to the first frame outside of this package and of torch: schedulers, hooks and scalers
    call us through torch. If there is no such frame, it leads to the outermost.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    return level


def is_called_by(function: str, module: str) -> bool:
    """Whether ``function`` of torch is the caller, with torch's and our own code in between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False
