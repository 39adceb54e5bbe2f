"""What compiled graphs need when they run: operators, packed weights, kernels, caches."""
