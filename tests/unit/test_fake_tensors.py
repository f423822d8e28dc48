"""Layers of sizes that no machine holds, traced with fake tensors on one of 512 ranks."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import tpkernels as tpk
from tpkernels.nn import ColumnParallelLinear, RowParallelLinear


@pytest.fixture
def rank_0_of_512():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_pair_traced_on_rank_0_of_512(rank_0_of_512):
    """Sizes whose memory no machine has: an allocation would fail."""
    rows, hidden, ffn, itemsize = 2**21 + 77, 2**20, 2**22, 2
    assert rows * hidden * itemsize > 2**41
    with FakeTensorMode(), tpk.log_collectives() as log:
        options = dict(group=rank_0_of_512, dtype=torch.bfloat16)
        column = ColumnParallelLinear(hidden, ffn, overlap=4, **options)
        row = RowParallelLinear(ffn, hidden, overlap=3, **options)
        x = torch.empty(rows, hidden, dtype=torch.bfloat16, requires_grad=True)
        out = row(column(x))
        out.sum().backward()
    assert column.weight.shape == (ffn // 512, hidden) and row.weight.shape == (hidden, ffn // 512)
    assert all(
        isinstance(t, FakeTensor)
        for t in (out, x.grad, column.weight, column.weight.grad, row.weight.grad, row.bias.grad)
    )
    assert (out.shape, x.grad.shape, column.weight.grad.shape) == (
        x.shape,
        x.shape,
        column.weight.shape,
    )
    formula = []
    for tag, chunks in (("row_forward", 3), ("column_backward", 4)):
        tiles = math.ceil(rows / 128)  # the last one ragged
        weights = {3: (1, 2, 1), 4: (1, 2, 2, 1)}[chunks]
        ends = [
            128 * math.floor(Fraction(tiles * weight, sum(weights)) + Fraction(1, 2))
            for weight in itertools.accumulate(weights)
        ]
        sizes = [b - a for a, b in zip([0, *ends], [*ends[:-1], rows], strict=False)]
        formula += [
            ("all_reduce", tag, size * hidden * itemsize, i, chunks) for i, size in enumerate(sizes)
        ]
    assert [(c.op, c.tag, c.bytes, c.chunk, c.chunks) for c in log] == formula
    assert sum(c.bytes for c in log) == 2 * rows * hidden * itemsize
