"""Benchmarks of fusedopt, run from the root of the checkout: python -m benchmarks.cpu_step."""
