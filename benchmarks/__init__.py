"""Measurements: ``python -m benchmarks.packing``."""
