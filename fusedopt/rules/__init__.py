"""One file for each rule, its declaration; csrc/rules and triton_kernels/rules compute it."""

import pkgutil

RULES = sorted(
    module.name
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ("declaration", "reference")
)
