"""Pickles of fusedopt 0.1 import their scaler from here; its code is in fusedopt/scaler."""

from .scaler.grad_scaler import GradScaler, _rebuild, fuse_scaler

__all__ = ["GradScaler", "_rebuild", "fuse_scaler"]
