"""Triton kernels of the fused ops, one file an op.

The ops run these kernels on GPUs, and C++ on CPUs or without Triton.
"""
