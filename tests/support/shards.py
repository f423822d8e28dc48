"""Properties that every ShardSpec has."""

import math
from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st

quiet = settings(deadline=None, database=None, derandomize=True)


ranks = st.integers(1, 9)


def rows_held(spec):
    """Row -> how many ranks read it."""
    return Counter(
        row for ranges in spec.intervals for start, stop in ranges for row in range(start, stop)
    )


def assert_partition(spec, dim=0):
    """Every row on exactly one rank, and the whole comes back from the shards, padded or not."""
    assert rows_held(spec) == Counter(range(spec.size))
    shape = [2, 3]
    shape.insert(dim % 3, spec.size)
    full = torch.arange(math.prod(shape)).view(shape)
    shards = [spec.shard(full, r) for r in range(len(spec.intervals))]
    assert [s.shape[dim] for s in shards] == spec.shard_sizes
    padded = [spec.pad(s) for s in shards]
    assert {p.shape[dim] for p in padded} == {spec.padded_shard_size}
    for shard, pad in zip(shards, padded, strict=True):
        assert torch.equal(pad.narrow(dim, 0, shard.shape[dim]), shard)
        assert not pad.narrow(
            dim, shard.shape[dim], spec.padded_shard_size - shard.shape[dim]
        ).any()
    assert torch.equal(spec.unshard(shards), full)
    assert torch.equal(spec.unshard(padded), full)
