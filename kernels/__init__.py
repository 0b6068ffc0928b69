"""Device code: Triton kernels and their references."""
