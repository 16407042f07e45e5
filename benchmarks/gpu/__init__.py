"""Whole steps and kernels on a GPU: `bash benchmarks/gpu.sh`, `python -m benchmarks gpu`."""
