"""Shard arithmetic: who holds which rows, and where the row chunks of an overlapped GEMM lie."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpkernels import _C
from tpkernels.sharding.heads import assign_heads
from tpkernels.sharding.spec import ShardSpec, chunk_sizes, even_sizes

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


@quiet
@given(st.integers(1, 100), ranks)
def test_chunk_sizes_are_torch_chunks(size, n):
    pieces = [len(piece) for piece in torch.empty(size).chunk(n)]
    assert chunk_sizes(size, n) == pieces + [0] * (n - len(pieces))


@quiet
@given(st.integers(0, 100), ranks)
def test_even_sizes(size, n):
    sizes = even_sizes(size, n)
    assert (len(sizes), sum(sizes), sizes) == (n, size, sorted(sizes, reverse=True))
    assert sizes[0] - sizes[-1] <= 1


@quiet
@given(st.integers(0, 20), ranks, st.integers(1, 3), st.sampled_from([0, 1, -1]))
def test_chunks_divide_every_block_as_torch_chunk_does(step, n, blocks, dim):
    split = ShardSpec.chunks(step * blocks, n, dim, blocks)
    assert_partition(split, dim)
    full = torch.arange(step * blocks)
    pieces = [block.split(chunk_sizes(step, n)) for block in full.view(blocks, step)]
    for r in range(n):
        assert torch.equal(
            ShardSpec.chunks(step * blocks, n, 0, blocks).shard(full, r),
            torch.cat([piece[r] for piece in pieces]),
        )


@quiet
@given(st.integers(1, 40), ranks, st.integers(1, 2))
def test_is_chunk_says_whether_dtensors_shard_fits(step, n, blocks):
    split = ShardSpec.chunks(step * blocks, n, blocks=blocks)
    full = torch.arange(step * blocks)
    stock = full.split(chunk_sizes(len(full), n))
    fits = all(torch.equal(split.shard(full, r), stock[r]) for r in range(n))
    assert fits or not split.is_chunk
    if blocks == 1:
        assert split.is_chunk


@st.composite
def owned_blocks(draw):
    """Lists of units, each with an owner, as ShardSpec.units takes them; every rank owns something, as assign_heads sees to it."""
    n = draw(ranks)
    blocks = draw(
        st.lists(st.lists(st.integers(0, n - 1), min_size=1, max_size=8), min_size=1, max_size=3)
    )
    blocks[0] = draw(st.permutations([*blocks[0], *range(n)]))
    return [
        (len(owners), [[unit for unit, owner in enumerate(owners) if owner == r] for r in range(n)])
        for owners in blocks
    ]


@quiet
@given(owned_blocks(), st.integers(1, 3), st.sampled_from([0, 1, -1]))
def test_units_with_one_owner_each(blocks, width, dim):
    split = ShardSpec.units(blocks, width, dim)
    assert split.size == width * sum(count for count, _ in blocks)
    assert_partition(split, dim)


overlapping = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5)


@quiet
@given(overlapping, st.integers(1, 3))
def test_units_are_read_in_the_order_given_and_owned_once(per_rank, width):
    """Also units that several ranks read, or one reads twice: who counts them, and how their gradients add up."""
    split = ShardSpec.units([(6, per_rank)], width)
    full = torch.arange(6 * width)
    shards = [split.shard(full, r) for r in range(len(per_rank))]
    assert [s.tolist() for s in shards] == [
        [unit * width + i for unit in units for i in range(width)] for units in per_rank
    ]
    counted = [
        row
        for r, shard in enumerate(shards)
        for start, stop in split.owned_rows[r]
        for row in shard[start:stop].tolist()
    ]
    assert sorted(counted) == sorted(rows_held(split))
    if set(rows_held(split)) == set(range(split.size)):
        assert split.has_shared_rows is (max(rows_held(split).values()) > 1)
        assert torch.equal(split.unshard(shards), full)
    ones = [torch.ones(1, size) for size in split.shard_sizes]
    total = sum(
        ShardSpec(1, split.size, split.intervals).scatter_add(one, r) for r, one in enumerate(ones)
    )
    assert total.tolist() == [[rows_held(split)[row] for row in range(split.size)]]


@quiet
@given(overlapping, st.integers(1, 3))
def test_replicated_is_stored_whole(per_rank, width):
    split = ShardSpec.units([(6, per_rank)], width, replicated=True)
    assert split.padded_shard_size == 6 * width and not split.is_chunk
    assert split.intervals == ShardSpec.units([(6, per_rank)], width).intervals


def check_heads(heads, kv, n):
    split, group = assign_heads(heads, kv, n), heads // kv
    assert [h for q in split.q_heads for h in q] == list(range(heads))
    for q, mine, size in zip(split.q_heads, split.kv_heads, split.queries_per_kv, strict=True):
        assert q and len(q) == size * len(mine)
        assert [mine[i // size] for i in range(len(q))] == [h // group for h in q]
    counts = [len(q) for q in split.q_heads]
    if n <= kv:
        assert [k for mine in split.kv_heads for k in mine] == list(
            range(kv)
        )  # whole KV groups, each on one rank
        assert max(counts) - min(counts) in (0, group)
        assert_partition(split.kv_spec(2))
        assert_partition(split.qkv_spec(2))
    else:
        assert max(counts) - min(counts) <= 1
        assert set().union(*split.kv_heads) == set(range(kv))
    for split_of in (split.kv_spec, split.qkv_spec):
        assert (
            split.kv_replicated
            is split_of(2, store_full=True).replicated
            is split_of(2).has_shared_rows
            is (n > kv)
        )
        assert (
            split_of(2, store_full=True).intervals == split_of(2).intervals
            and not split_of(2).replicated
        )
    assert_partition(split.q_spec(2))
    full = torch.arange((heads + 2 * kv) * 2).view(-1, 2)
    q, k, v = full.split([heads, kv, kv])
    for r in range(n):
        want = torch.cat(
            [q[list(split.q_heads[r])], k[list(split.kv_heads[r])], v[list(split.kv_heads[r])]]
        )
        assert torch.equal(split.qkv_spec(2).shard(full.flatten(), r), want.flatten())


@pytest.mark.parametrize("heads", range(1, 13))
def test_every_query_head_meets_its_kv_head(heads):
    for kv in (kv for kv in range(1, heads + 1) if heads % kv == 0):
        for n in range(1, heads + 1):
            check_heads(heads, kv, n)


@pytest.mark.parametrize("heads,kv,n", [(9, 3, 10), (1, 1, 2), (4, 1, 7)])
def test_more_ranks_than_heads_names_both(heads, kv, n):
    with pytest.raises(ValueError, match=rf"\b{heads} attention heads.* {n} ranks"):
        assign_heads(heads, kv, n)


@pytest.mark.parametrize("heads,kv", [(9, 2), (4, 8), (4, 0)])
def test_kv_heads_that_do_not_divide_the_heads(heads, kv):
    with pytest.raises(ValueError, match=f"num_kv_heads={kv} .*num_heads={heads}"):
        assign_heads(heads, kv, 2)


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
        assert (
            max(tiles) == 1
        )  # fewer chunks than asked for only where each is as small as alignment lets it be
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
