"""Dropout is the same at any number of ranks."""

import torch
import torch.distributed as dist
from pool import run_on_ranks
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import ParallelTransformerBlock
from tpkernels.sharding.spec import ShardSpec


def masks_of_ranks():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x, columns = torch.ones(6, 11), ShardSpec.chunks(11, world, dim=-1)
    torch.manual_seed(5)
    whole = tpf.dropout(x)
    mine = tpf.dropout(
        columns.shard(x, rank), seed=torch.tensor([9]), column=sum(columns.shard_sizes[:rank])
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
    """The mask of the default generator, of a sharded tensor and in a block is the same."""
    whole, sharded, *block = pool.run(1, masks_of_ranks)[0]
    assert 0 < (whole == 0).sum() < 66 and torch.equal(
        sharded, tpf.dropout(torch.ones(6, 11), seed=torch.tensor([9]))
    )
    for ranks in (2, 3):
        for masks in pool.run(ranks, masks_of_ranks):
            assert torch.equal(masks[0], whole) and torch.equal(masks[1], sharded)
            assert_close(masks[2:], block, atol=1e-4, rtol=1e-4)


def block(**options):
    torch.manual_seed(6)
    return ParallelTransformerBlock(12, 6, norm="rmsnorm", group=dist.group.WORLD, **options)


@run_on_ranks(2)
def test_dropout_leaves_the_residual_stream_whole():
    x, dy = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 12)
    out = block(dropout=1.0)(x)  # nothing of the branches is left
    out.backward(dy)
    assert torch.equal(out, x) and torch.equal(x.grad, dy)
    # Half of one branch is dropped, and what is kept is doubled.
    half = block(dropout=0.5)
    half.mlp.register_forward_hook(lambda module, args, output: output * 0)
    branch = half.attention(half.attention_norm(x)).detach()
    added = (half(x) - x).detach()
    kept = added.abs() > 1e-6
    assert 20 < kept.sum() < 100
    assert_close(added, torch.where(kept, 2 * branch, 0), atol=1e-6, rtol=1e-5)


@run_on_ranks(2)
def test_dropout_is_off_in_eval():
    x = torch.randn(2, 5, 12)
    want = block()(x)
    for options in (dict(dropout=0.5), dict(attention_dropout=0.5)):
        dropping = block(**options)
        assert not torch.equal(dropping(x), want)
        assert_close(dropping.eval()(x), want, atol=1e-6, rtol=1e-6)
        assert dropping.train()(x).sub(want).abs().max() > 1e-3
