"""Triton kernels of the fused ops, for GPUs."""
