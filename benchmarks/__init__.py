"""Benchmarks of fusedopt, run from the root of the checkout: `python -m benchmarks --help`."""
