"""Properties that every ShardSpec has."""

import math
from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st

quiet = settings(deadline=None, database=None, derandomize=True)


ranks = st.integers(1, 9)


def rows_held(split):
    """Row -> how many ranks read it."""
    return Counter(
        row for ranges in split.intervals for start, stop in ranges for row in range(start, stop)
    )


def assert_partition(split, dim=0):
    """Every row on exactly one rank, and the whole comes back from the shards, padded or not."""
    assert rows_held(split) == Counter(range(split.size))
    shape = [2, 3]
    shape.insert(dim % 3, split.size)
    full = torch.arange(math.prod(shape)).view(shape)
    shards = [split.shard(full, r) for r in range(len(split.intervals))]
    assert [s.shape[dim] for s in shards] == split.shard_sizes
    padded = [split.pad(s) for s in shards]
    assert {p.shape[dim] for p in padded} == {split.padded_shard_size}
    for shard, pad in zip(shards, padded, strict=True):
        assert torch.equal(pad.narrow(dim, 0, shard.shape[dim]), shard)
        assert not pad.narrow(
            dim, shard.shape[dim], split.padded_shard_size - shard.shape[dim]
        ).any()
    assert torch.equal(split.unshard(shards), full)
    assert torch.equal(split.unshard(padded), full)
