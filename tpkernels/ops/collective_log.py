"""The log of collectives that tpkernels starts, and what fake kernels write to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from .. import _C
from ..process_group import find_process_group


class Collective(NamedTuple):
    """One entry of the log.

    Attributes:
        op: "all_reduce" or "all_gather".
        tag: what the collective was for, such as "row_forward".
        group: name of the process group.
        bytes: of the reduced buffer, or of the gathered result.
        chunk: position among `chunks`, from 0.
        chunks: row chunks of the op.
    """

    op: str
    tag: str
    group: str
    bytes: int
    chunk: int
    chunks: int


@contextmanager
def log_collectives() -> Iterator[list[Collective]]:
    """Collect the collectives that tpkernels starts in this process, on any thread.

    It works under FakeTensorMode too, where nothing is sent. torch's CommDebugMode does not see
    collectives that C++ starts.

    Yields:
        A list, which fills when the block ends.

    Raises:
        RuntimeError: the log is running already: logs do not nest.

    Example:
        >>> with log_collectives() as log:
        ...     pass  # forward and backward
        >>> sum(entry.bytes for entry in log)
        0
    """
    entries: list[Collective] = []
    _C.log_start()
    try:
        yield entries
    finally:
        entries.extend(Collective(*row) for row in _C.log_stop())


def log_fake(op: str, tag: str, group: str, buffer: Tensor, chunks: int = 0) -> None:
    """Write what the real op would for `buffer`: a line, or with `chunks` one a chunk of rows."""
    if not _C.log_enabled():  # under dynamic shapes sizes are symbols, which nothing may ask
        return
    if not chunks:
        log_fake_chunk(op, tag, group, buffer, 0, 1)
    elif buffer.numel():
        m, n = buffer.numel() // buffer.shape[-1], buffer.shape[-1]
        bounds = _C.chunk_bounds(m, chunks, n * buffer.itemsize)
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            log_fake_chunk(op, tag, group, buffer.view(m, n)[begin:end], i, len(bounds) - 1)


def log_fake_chunk(op: str, tag: str, group: str, buffer: Tensor, chunk: int, chunks: int) -> None:
    """Write what the real op would for one chunk: nothing if it is empty or the rank is alone."""
    if _C.log_enabled() and buffer.numel() and find_process_group(group).size() > 1:
        _C.log_write(op, tag, group, buffer.numel() * buffer.itemsize, chunk, chunks)
