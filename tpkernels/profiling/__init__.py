"""NVTX ranges in tpkernels' domain, and the overlap report of a recorded trace."""

from .ranges import range

__all__ = ["range"]
