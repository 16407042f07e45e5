"""Who calls us: the line of the user's code that a warning is about, or a function of torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

OURS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__)))


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
