"""Dropout is the same at any number of ranks."""

import torch
import torch.distributed as dist
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
