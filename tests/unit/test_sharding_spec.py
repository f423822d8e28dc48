"""Shard arithmetic: the rows that each rank holds, reads and owns."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import assert_partition, quiet, ranks, rows_held

from tpkernels.sharding.spec import ShardSpec, chunk_sizes, even_sizes


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
    spec = ShardSpec.chunks(step * blocks, n, dim, blocks)
    assert_partition(spec, dim)
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
    spec = ShardSpec.chunks(step * blocks, n, blocks=blocks)
    full = torch.arange(step * blocks)
    stock = full.split(chunk_sizes(len(full), n))
    fits = all(torch.equal(spec.shard(full, r), stock[r]) for r in range(n))
    assert fits or not spec.is_chunk
    if blocks == 1:
        assert spec.is_chunk


@st.composite
def owned_blocks(draw):
    """Draw lists of units with one owner each, as ShardSpec.units takes them.

    Every rank owns something, as assign_heads sees to it.
    """
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
    spec = ShardSpec.units(blocks, width, dim)
    assert spec.size == width * sum(count for count, _ in blocks)
    assert_partition(spec, dim)


overlapping = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5)


@quiet
@given(overlapping, st.integers(1, 3))
def test_units_are_read_in_the_order_given_and_owned_once(per_rank, width):
    """Units that several ranks read, or one reads twice, have one owner; gradients add up."""
    spec = ShardSpec.units([(6, per_rank)], width)
    full = torch.arange(6 * width)
    shards = [spec.shard(full, r) for r in range(len(per_rank))]
    assert [s.tolist() for s in shards] == [
        [unit * width + i for unit in units for i in range(width)] for units in per_rank
    ]
    counted = [
        row
        for r, shard in enumerate(shards)
        for start, stop in spec.owned_rows[r]
        for row in shard[start:stop].tolist()
    ]
    assert sorted(counted) == sorted(rows_held(spec))
    if set(rows_held(spec)) == set(range(spec.size)):
        assert spec.has_shared_rows is (max(rows_held(spec).values()) > 1)
        assert torch.equal(spec.unshard(shards), full)
    ones = [torch.ones(1, size) for size in spec.shard_sizes]
    total = sum(
        ShardSpec(1, spec.size, spec.intervals).scatter_add(one, r) for r, one in enumerate(ones)
    )
    assert total.tolist() == [[rows_held(spec)[row] for row in range(spec.size)]]


@quiet
@given(overlapping, st.integers(1, 3))
def test_replicated_is_stored_whole(per_rank, width):
    spec = ShardSpec.units([(6, per_rank)], width, replicated=True)
    assert spec.padded_shard_size == 6 * width and not spec.is_chunk
    assert spec.intervals == ShardSpec.units([(6, per_rank)], width).intervals
