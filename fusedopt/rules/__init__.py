"""One file a rule: all that Python knows of it. csrc/rules and triton_kernels/rules compute it."""
