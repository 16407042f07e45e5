"""fusedopt: the training step after ``backward()``, done once.

``FusedAdamW`` and ``FusedSGD`` replace ``torch.optim.AdamW`` and ``torch.optim.SGD``; ``FusedLion``
is Lion, which torch lacks. Unscaling, inf/NaN check, gradient clipping, weight decay, update and
the low-precision copy of fp32 masters are one step over the parameters.
"""

import torch as _torch  # noqa: F401  first: the native module then shares torch's OpenMP pool

from .adamw import FusedAdamW
from .backends.registry import FusedOptFallbackWarning
from .estimate import estimate_memory
from .export import to_torch
from .lion import FusedLion
from .param_groups import param_groups
from .scaler.grad_scaler import GradScaler, fuse_scaler
from .sgd import FusedSGD
from .sizes import MemoryEstimate

__version__ = "0.1.0"

__all__ = [
    "FusedAdamW",
    "FusedLion",
    "FusedOptFallbackWarning",
    "FusedSGD",
    "GradScaler",
    "MemoryEstimate",
    "__version__",
    "estimate_memory",
    "fuse_scaler",
    "param_groups",
    "to_torch",
]
