"""Where a pickle of fusedopt 0.1 looks for its scaler; the room is fusedopt/scaler."""

from .scaler.grad_scaler import GradScaler, _rebuild, fuse_scaler

__all__ = ["GradScaler", "_rebuild", "fuse_scaler"]
