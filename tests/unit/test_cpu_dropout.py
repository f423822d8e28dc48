"""Dropout by the CPU kernels and in ATen calls: the bits of Philox."""

import pytest
import torch
from cpu_ops import COLUMNS, dropout, dtypes, make


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    "leading,columns", [((3,), n) for n in COLUMNS] + [((), 5), ((2, 2), 9), ((0,), 4)]
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_is_philox(ops, p, leading, columns, layout, dtype):
    x, seed = make(*leading, columns, dtype=dtype, layout=layout), torch.tensor(-(2**62) + 12345)
    for row, column in ((0, 0), (2**33 + 1, 6), (5, 2**32 * 4 - 9)):
        assert torch.equal(ops.dropout(x, seed, p, row, column), dropout(x, seed, p, row, column))


def test_dropout_of_a_slice_is_the_slice_of_the_whole(ops):
    x, seed = make(40, 100), torch.tensor([77])
    whole = ops.dropout(x, seed, 0.5, 0, 0)
    for rows, columns in (((3, 20), (0, 100)), ((0, 40), (50, 100)), ((7, 8), (33, 71))):
        part = x[slice(*rows), slice(*columns)]
        assert torch.equal(
            ops.dropout(part, seed, 0.5, rows[0], columns[0]), whole[slice(*rows), slice(*columns)]
        )


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_its_share(ops, p):
    x, n = torch.ones(1000, 1000), 1e6
    out = ops.dropout(x, torch.tensor(3), p, 0, 0)
    kept = (out != 0).sum().item()
    assert abs(kept - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    assert not torch.equal(out, ops.dropout(x, torch.tensor(4), p, 0, 0))
    assert not ops.dropout(torch.full((2, 50), torch.nan), torch.tensor(3), 1.0, 0, 0).any()
