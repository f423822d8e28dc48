"""NVTX ranges from Python, in the domain that the C++ engine's ranges are in."""

from collections.abc import Iterator
from contextlib import contextmanager

from .. import _C


@contextmanager
def range(name: str) -> Iterator[None]:
    """Mark what runs inside as `name` for a profiler, in NVTX's domain "tpkernels".

    It does nothing where no profiler is attached. On a GPU the range covers the launches; Nsight
    Systems projects it onto what they ran (docs/profiling.md).

    Args:
        name: of the range.

    Example:
        >>> with range("step 1"):
        ...     pass
    """
    _C.range_push(name)
    try:
        yield
    finally:
        _C.range_pop()
