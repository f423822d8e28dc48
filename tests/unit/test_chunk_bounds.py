"""The row chunks of an overlapped GEMM."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import quiet

from tpkernels import _C
from tpkernels.ops.linear import rows_of


@settings(quiet, max_examples=500)
@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 5000))
def test_chunk_bounds(rows, chunks, row_bytes):
    bounds = _C.chunk_bounds(rows, chunks, row_bytes)
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
    assert len(bounds) - 1 <= chunks
    assert all(bound * row_bytes % 16 == 0 for bound in bounds[:-1])
    tile = 16 // math.gcd(16, row_bytes)
    if rows >= 128 * chunks:
        tile = 128
        assert len(bounds) - 1 == chunks and all(bound % 128 == 0 for bound in bounds[:-1])
    tiles = [-(-(b - a) // tile) for a, b in zip(bounds, bounds[1:], strict=False)]
    if len(bounds) - 1 < chunks:
        # Fewer chunks than asked for only where each is as small as alignment lets it be.
        assert max(tiles) == 1
    assert max(tiles[0], tiles[-1]) <= max(
        tiles[len(tiles) // 2 - (len(tiles) > 1) : len(tiles) // 2 + 1]
    )
    weights = [min(i + 1, len(tiles) - i) for i in range(len(tiles))]
    if sum(tiles) >= sum(weights):
        ends = zip(itertools.accumulate(tiles), itertools.accumulate(weights), strict=True)
        assert all(
            abs(end - Fraction(sum(tiles) * weight, sum(weights))) <= Fraction(1, 2)
            for end, weight in ends
        )


def test_chunk_bounds_by_example():
    assert _C.chunk_bounds(0, 3, 64) == [0, 0]
    assert _C.chunk_bounds(2048, 6, 64) == [0, 128, 512, 1024, 1536, 1920, 2048]
    assert _C.chunk_bounds(4096, 2, 64) == [0, 2048, 4096]
    with pytest.raises(RuntimeError, match="chunks must be at least 1, got 0"):
        _C.chunk_bounds(8, 0, 64)


def test_rows_of():
    """Rows choose the chunks, of a shard of one feature too."""
    shapes = {(2, 3, 4): 6, (2, 3, 1): 6, (5,): 1, (1,): 1, (0, 4): 0}
    assert {shape: rows_of(torch.zeros(shape)) for shape in shapes} == shapes
