"""The log of collectives: the same for fake and for real tensors, ended by its block."""

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels import _C
from tpkernels.nn import (
    ColumnParallelLinear,
    ParallelSelfAttention,
    ParallelTransformerBlock,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tpkernels.sharding.spec import ShardSpec


def run_everything(group, place):
    """Layers in ragged chunks, both ways; `place` makes what the calls are given real or fake."""
    x, rest = place(torch.randn(5, 101, 18)).requires_grad_(), place(torch.randn(5, 101, 18))
    ids, target = place(torch.randint(31, (5, 101))), place(torch.randint(31, (5, 101)))
    options = dict(group=group, overlap=3)
    for layer in (
        ColumnParallelLinear(18, 23, gather_output=True, **options),
        RowParallelLinear(18, 23, input_is_parallel=False, **options),
        ParallelSelfAttention(18, 9, 3, **options),
        ParallelSelfAttention(18, 9, 1, **options),
        ParallelTransformerBlock(18, 9, activation="swiglu", **options),
    ):
        out = layer(x)
        out.backward(torch.ones_like(out))
        tpk.unsharded_gradients(layer)
    row = RowParallelLinear(18, 18, **options)
    row(row.input_spec.shard(x, dist.get_rank()), rest)
    VocabParallelEmbedding(31, 18, group=group)(ids).sum().backward()
    logits = x[..., : ShardSpec.chunks(31, dist.get_world_size()).shard_sizes[dist.get_rank()]]
    tpf.vocab_parallel_cross_entropy(
        logits, target, group=group, num_classes=31, label_smoothing=0.1
    ).backward()
    words, bias = (
        place(torch.randn(logits.shape[-1], 18)).requires_grad_(),
        place(torch.randn(logits.shape[-1])).requires_grad_(),
    )
    for options in (dict(chunk_rows=200), dict(chunk_rows=600, label_smoothing=0.1)):
        loss = tpf.vocab_parallel_linear_cross_entropy(
            x, words, target, bias, group=group, num_classes=31, **options
        )
        loss.backward()
    tables = [place(t) for t in tpf.rotary_tables(101, 2)]
    block = ParallelTransformerBlock(18, 9, norm="rmsnorm", dropout=0.5, group=group, overlap=3)
    block(x, rotary=tables).sum().backward()
    with torch.no_grad():
        block.eval()(x)
        tpf.vocab_parallel_linear_cross_entropy(x, words, target, group=group, num_classes=31)
        tpf.vocab_parallel_linear_cross_entropy(
            x[:0], words, target[:0], group=group, num_classes=31
        )
        tpk.all_reduce_(x[1:1], group)
        tpk.all_reduce_(x.transpose(0, 1), group)


@run_on_ranks(2)
def test_fake_log_is_the_real_one():
    logs = []
    for mode in (None, FakeTensorMode()):
        with tpk.log_collectives() as log:
            if mode is None:
                run_everything(dist.group.WORLD, lambda t: t)
            else:
                with mode:
                    run_everything(dist.group.WORLD, lambda t: torch.empty_like(t, device="cpu"))
        logs.append(log)
    real, fake = logs
    assert real == fake
    assert {c.op for c in real} == {"all_reduce", "all_gather"} and {c.chunks for c in real} == {
        1,
        3,
    }
    ragged = [c.bytes for c in real if c.tag == "row_forward"][:3]
    assert sum(ragged) == 505 * 23 * 4 and len(set(ragged)) > 1


@run_on_ranks(2)
def test_the_log_ends_with_its_block_and_does_not_nest():
    group = dist.group.WORLD
    with pytest.raises(KeyError), tpk.log_collectives() as log:
        tpk.all_reduce_(torch.ones(3), group)
        raise KeyError
    assert [c.bytes for c in log] == [12]
    with tpk.log_collectives() as log:
        with pytest.raises(RuntimeError, match="do not nest"), tpk.log_collectives():
            pass
        tpk.all_reduce_(torch.ones(5), group)
    assert [c.bytes for c in log] == [20] and not _C.log_enabled()
    with pytest.raises(ValueError, match="op must be 'sum' or 'max', got 'min'"):
        torch.ops.tpkernels.all_reduce_(torch.ones(3), group.group_name, "min", "x")
