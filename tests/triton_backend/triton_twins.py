"""One optimizer served by the interpreted Triton kernels, and its twin on the CPU backend."""

from __future__ import annotations

from gpu_twins import Twins, shifted

__all__ = ["TritonTwins", "shifted"]


class TritonTwins(Twins):
    backend = "triton"
