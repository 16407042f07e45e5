"""The verbs as Triton kernels: csrc/cuda, file by file, for GPUs without the CUDA module."""
