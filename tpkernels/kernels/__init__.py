"""Triton kernels of the fused ops, one file an op; on CPUs and without Triton the ops run in C++."""
