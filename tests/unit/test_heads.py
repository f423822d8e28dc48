"""The assignment of attention heads to ranks."""

import pytest
import torch
from shards import assert_partition

from tpkernels.sharding.heads import assign_heads


def check_heads(heads, kv, n):
    assignment, group = assign_heads(heads, kv, n), heads // kv
    assert [h for q in assignment.q_heads for h in q] == list(range(heads))
    for q, mine, size in zip(
        assignment.q_heads, assignment.kv_heads, assignment.queries_per_kv, strict=True
    ):
        assert q and len(q) == size * len(mine)
        assert [mine[i // size] for i in range(len(q))] == [h // group for h in q]
    counts = [len(q) for q in assignment.q_heads]
    if n <= kv:
        # KV groups stay whole, each on one rank.
        assert [k for mine in assignment.kv_heads for k in mine] == list(range(kv))
        assert max(counts) - min(counts) in (0, group)
        assert_partition(assignment.kv_spec(2))
        assert_partition(assignment.qkv_spec(2))
    else:
        assert max(counts) - min(counts) <= 1
        assert set().union(*assignment.kv_heads) == set(range(kv))
    for spec_of in (assignment.kv_spec, assignment.qkv_spec):
        assert (
            assignment.kv_replicated
            is spec_of(2, store_full=True).replicated
            is spec_of(2).has_shared_rows
            is (n > kv)
        )
        assert (
            spec_of(2, store_full=True).intervals == spec_of(2).intervals
            and not spec_of(2).replicated
        )
    assert_partition(assignment.q_spec(2))
    full = torch.arange((heads + 2 * kv) * 2).view(-1, 2)
    q, k, v = full.split([heads, kv, kv])
    for r in range(n):
        want = torch.cat(
            [
                q[list(assignment.q_heads[r])],
                k[list(assignment.kv_heads[r])],
                v[list(assignment.kv_heads[r])],
            ]
        )
        assert torch.equal(assignment.qkv_spec(2).shard(full.flatten(), r), want.flatten())


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
