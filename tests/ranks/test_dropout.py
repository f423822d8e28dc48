"""Dropout by seed and position: as a Function, as a module, on ranks that hold parts of a tensor, and in a block."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import Dropout, ParallelTransformerBlock
from tpkernels.sharding.spec import ShardSpec


def seed_of(n):
    return torch.tensor([n])


def test_dropout_of_a_part_is_a_part_of_the_wholes():
    x = torch.rand(12, 31) + 1
    for p, seed in itertools.product((0.3, 0.9), (seed_of(5), seed_of(2**62 + 3))):
        whole = tpf.dropout(x, p, seed)
        kept = whole != 0
        assert_close(whole[kept], x[kept] / (1 - p))
        assert abs(kept.float().mean() - (1 - p)) < 0.1
        for rows, columns in itertools.product(
            ((0, 12), (5, 12), (3, 4)), ((0, 31), (13, 31), (8, 12), (30, 31))
        ):
            part = x[slice(*rows), slice(*columns)]
            assert torch.equal(
                tpf.dropout(part, p, seed, row=rows[0], column=columns[0]),
                whole[slice(*rows), slice(*columns)],
            )
        assert torch.equal(tpf.dropout(x.view(3, 4, 31), p, seed), whole.view(3, 4, 31))
        assert not torch.equal(tpf.dropout(x, p, seed + 1) != 0, kept)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_the_gradient_of_dropout_has_its_mask(p):
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.rand(6, 10) + 1).to(dtype).requires_grad_()
        y = tpf.dropout(x, p, seed_of(1))
        dy = torch.rand(6, 10).to(dtype) + 1
        y.backward(dy)
        kept = y != 0
        assert kept.all() if p == 0 else not kept.any() if p == 1 else 0 < kept.sum() < 60
        assert torch.equal(x.grad != 0, kept) and y.dtype == x.grad.dtype == dtype
        for ours, source in ((y, x), (x.grad, dy)):
            want = torch.where(kept, source.float() / (1 - p) if p < 1 else 0, 0).to(dtype)
            assert_close(ours, want)


def test_dropout_without_a_seed_draws_one_and_moves_on():
    x = torch.ones(40, 5)
    torch.manual_seed(3)
    a, b = tpf.dropout(x), tpf.dropout(x)
    torch.manual_seed(3)
    assert (
        torch.equal(tpf.dropout(x), a) and torch.equal(tpf.dropout(x), b) and not torch.equal(a, b)
    )
    layer = Dropout(0.5)
    torch.manual_seed(3)
    assert torch.equal(layer(x), a)
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x


def test_dropout_is_recomputed_by_checkpointing():
    x = torch.randn(40, 5, requires_grad=True)
    torch.manual_seed(3)
    y = checkpoint(
        lambda x: tpf.dropout(x * 1.0).square(), x, use_reentrant=False, preserve_rng_state=True
    )
    y.sum().backward()
    assert 0 < (y == 0).sum() < 200
    assert_close(x.grad, torch.where(y != 0, 8 * x, 0))  # y = (2 x)^2


def masks_of_ranks():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x, columns = torch.ones(6, 11), ShardSpec.chunks(11, world, dim=-1)
    torch.manual_seed(5)
    whole = tpf.dropout(x)
    mine = tpf.dropout(
        columns.shard(x, rank), seed=seed_of(9), column=sum(columns.shard_sizes[:rank])
    )
    gathered = [None] * world
    dist.all_gather_object(gathered, mine)
    torch.manual_seed(6)
    block = ParallelTransformerBlock(12, 6, norm="rmsnorm", dropout=0.4, group=group)
    x = torch.randn(2, 5, 12, requires_grad=True)
    out = block(x)
    out.square().sum().backward()
    return (
        whole,
        torch.cat(gathered, -1),
        out.detach(),
        x.grad,
        dict(tpk.unsharded_gradients(block)),
    )


def test_dropout_is_the_same_at_any_tp_size(pool):
    """From the default generator, of a split tensor, and in a block: nothing of it depends on the number of ranks."""
    whole, split, *block = pool.run(1, masks_of_ranks)[0]
    assert 0 < (whole == 0).sum() < 66 and torch.equal(
        split, tpf.dropout(torch.ones(6, 11), seed=seed_of(9))
    )
    for ranks in (2, 3):
        for masks in pool.run(ranks, masks_of_ranks):
            assert torch.equal(masks[0], whole) and torch.equal(masks[1], split)
            assert_close(masks[2:], block, atol=1e-4, rtol=1e-4)
