"""NVTX ranges in tpkernels' domain, and the overlap report of a recorded trace (`tpkernels trace`)."""

from .ranges import range

__all__ = ["range"]
