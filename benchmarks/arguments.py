"""The parsers of the commands, and types of arguments that several of them take."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number


def positive_float(text: str) -> float:
    number = float(text)
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a finite number above 0")
    return number


def device(text: str) -> torch.device:
    import torch  # not for what only counts

    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: torch.cuda.is_available() is False")
    return found


def gpu_name(device: torch.device) -> str | None:
    """The machine that figures are about, where that is a GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
