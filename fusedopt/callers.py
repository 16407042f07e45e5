"""The line of the user's that a warning is about."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

OURS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__)))


def users_level() -> int:
    """``stacklevel`` for a ``warnings.warn`` in the caller.

    It leads to the first frame that is neither of this package nor of torch, through which
    schedulers, hooks and scalers come here; to the outermost where there is no other.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    return level
