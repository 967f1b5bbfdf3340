"""Triton kernels. Nothing here is imported before a tensor on a GPU, a tuner or a test asks for it."""
