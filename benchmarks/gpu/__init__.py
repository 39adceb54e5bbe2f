"""Kernels on a GPU beside cuBLAS and others: ``python -m benchmarks.gpu``."""
