"""Mistakes that every rank can see raise the same exception on all, before any communication."""

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import run_on_ranks
from refusal import assert_refused
from torch import nn

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import (
    ColumnParallelLinear,
    ParallelMLP,
    ParallelSelfAttention,
    ParallelTransformerBlock,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)

# This rank's input and weights, of 18 features in and out.
X = torch.zeros(4, 18)
W_COLUMN = torch.zeros(7, 18)
W_ROW = torch.zeros(18, 7)


def column(x=X, w=W_COLUMN, b=None, **options):
    return lambda: tpf.column_parallel_linear(x, w, b, group=dist.group.WORLD, **options)


def row(x=X[:, :7], w=W_ROW, b=None, **options):
    return lambda: tpf.row_parallel_linear(x, w, b, group=dist.group.WORLD, **options)


@run_on_ranks(3)
def test_bad_shapes():
    layer = RowParallelLinear(18, 18, group=dist.group.WORLD)
    assert_refused(
        column(X[:, :17]), ValueError, "input has shape (4, 17)", "weight is (7, 18)", "must be 18"
    )
    assert_refused(
        row(X), ValueError, "input has shape (4, 18)", "weight is (18, 7)", "input_is_parallel"
    )
    assert_refused(
        lambda: layer(torch.zeros(4, 11)),
        ValueError,
        "input has shape (4, 11)",
        "weight is (18, 6)",
    )
    assert_refused(column(torch.tensor(1.0)), ValueError, "input has shape ()")
    assert_refused(
        row(torch.tensor(1.0), input_is_parallel=False), ValueError, "input has shape ()"
    )
    assert_refused(column(w=torch.zeros(18)), ValueError, "weight", "matrix", "(18,)")
    assert_refused(column(w=torch.zeros(())), ValueError, "weight", "matrix", "()")


@run_on_ranks(3)
def test_bad_dtypes_and_devices():
    half = torch.bfloat16
    layer = RowParallelLinear(18, 18, group=dist.group.WORLD)
    assert_refused(
        column(w=W_COLUMN.to(half)), TypeError, "weight is torch.bfloat16", "input is torch.float32"
    )
    assert_refused(
        row(w=W_ROW.to(half)), TypeError, "weight is torch.bfloat16", "input is torch.float32"
    )
    assert_refused(
        row(b=torch.zeros(18, dtype=half)),
        TypeError,
        "bias is torch.bfloat16",
        "input is torch.float32",
    )
    assert_refused(
        lambda: layer(torch.zeros(4, 6, dtype=half)),
        TypeError,
        "weight is torch.float32",
        "input is torch.bfloat16",
    )
    assert_refused(
        column(w=W_COLUMN.to("meta")), ValueError, "weight is on meta", "input is on cpu"
    )
    assert_refused(column(X.long()), TypeError, "input", "torch.int64")
    assert_refused(row(X[:, :7].int()), TypeError, "input", "torch.int32")


@run_on_ranks(3)
def test_bad_biases_residuals_and_options():
    assert_refused(column(b=torch.zeros(8)), ValueError, "bias has shape (8,)", "7")
    assert_refused(column(b=torch.zeros(1)), ValueError, "bias has shape (1,)", "7")
    assert_refused(row(b=torch.zeros(17)), ValueError, "bias has shape (17,)", "18")
    assert_refused(
        row(residual=torch.zeros(4, 17)), ValueError, "residual has shape (4, 17)", "(4, 18)"
    )
    assert_refused(row(residual=torch.zeros(18)), ValueError, "residual has shape (18,)", "(4, 18)")
    assert_refused(column(activation="tanh"), ValueError, "activation", "'tanh'", "swiglu")
    assert_refused(column(activation="swiglu"), ValueError, "swiglu", "7")
    assert_refused(row(overlap=True), ValueError, "overlap", "True")
    assert_refused(column(overlap="yes"), ValueError, "overlap", "'yes'")
    assert_refused(
        lambda: tpf.bias_act(X, torch.zeros(17), "gelu"), ValueError, "bias", "(17,)", "18"
    )
    assert_refused(
        lambda: tpk.all_reduce_(torch.zeros(3, requires_grad=True), dist.group.WORLD),
        ValueError,
        "tensor",
        "requires grad",
    )


@run_on_ranks(3)
def test_figures_of_the_layers_messages():
    here = f"on rank {dist.get_rank()} of 3: "
    for call, message in (
        (
            column(X[:, :17]),
            f"input has shape (4, 17) but weight is (7, 18) {here}the last dimension must be 18 (",
        ),
        (
            column(b=torch.zeros(8)),
            f"bias has shape (8,) but weight has 7 output features {here}pass ",
        ),
        (
            row(residual=torch.zeros(4, 17)),
            "residual has shape (4, 17) but the output has (4, 18)",
        ),
        (column(activation="swiglu"), "two halves of one size, got 7 features"),
    ):
        assert_refused(call, ValueError, message)


@run_on_ranks(3)
def test_figures_of_the_embeddings_messages():
    def embedding(rows, *ids):
        weight = torch.zeros(rows, 2)
        return lambda: tpf.vocab_parallel_embedding(
            torch.tensor(ids), weight, 12, group=dist.group.WORLD
        )

    assert_refused(
        embedding(5, 0),
        ValueError,
        f"weight has 5 rows on rank {dist.get_rank()}, "
        "but num_embeddings=12 over 3 ranks is [4, 4, 4]",
    )
    assert_refused(
        embedding(4, -1, 4),
        IndexError,
        "ids has values from -1 to 4, but a vocabulary of that size takes 0 to 11",
    )


@run_on_ranks(3)
def test_figures_of_the_losses_messages():
    hidden, weight, target = torch.zeros(5, 18), torch.zeros(4, 18), torch.zeros(5).long()

    def loss(rows=5, target=target):
        logits = torch.zeros(rows, 4)
        return lambda: tpf.vocab_parallel_cross_entropy(
            logits, target, num_classes=12, group=dist.group.WORLD
        )

    def linear_loss(weight=weight, bias=None):
        return lambda: tpf.vocab_parallel_linear_cross_entropy(
            hidden, weight, target, bias, num_classes=12, group=dist.group.WORLD
        )

    for kind, call, message in (
        (
            ValueError,
            linear_loss(weight[:, :17]),
            "input has shape (5, 18) but weight_shard is (4, 17): it must be [V_r, 18]",
        ),
        (
            ValueError,
            linear_loss(bias=torch.zeros(3)),
            "bias_shard has shape (3,) but weight_shard has 4 classes",
        ),
        (ValueError, loss(6), "target has shape (5,), but logits_shard (6, 4) needs (6,)"),
        (
            IndexError,
            loss(target=torch.tensor([0, 3, 12, 5, 2])),
            "target has values from 0 to 12, but 12 classes takes 0 to 11",
        ),
    ):
        assert_refused(call, kind, message)
    logits = torch.zeros(5, 3 + 2 * (dist.get_rank() == 1))
    with pytest.raises(ValueError, match=r"the 3 ranks' logits .* \(from 3 to 5\)"):
        tpf.vocab_parallel_cross_entropy(logits, target, group=dist.group.WORLD)


@run_on_ranks(3)
def test_whole_input_of_another_size():
    """Sharded as torch.chunk does, 17 features would fit the first two ranks."""
    weight = torch.zeros(18, 6)  # on three ranks: 18 input features
    assert_refused(
        lambda: tpf.row_parallel_linear(
            torch.zeros(4, 17), weight, group=dist.group.WORLD, input_is_parallel=False
        ),
        ValueError,
        "input has 17 features but the layer takes 18 (",
    )


@run_on_ranks(3)
def test_bad_overlap():
    options = dict(group=dist.group.WORLD)
    for bad in (True, 0, -1, "yes", 1.5, None):
        call = partial(ColumnParallelLinear, 4, 4, overlap=bad, **options)
        assert_refused(call, ValueError, "overlap", repr(bad))
    call = partial(RowParallelLinear.from_linear, nn.Linear(4, 4), overlap=0, **options)
    assert_refused(call, ValueError, "overlap", "0")


@run_on_ranks(3)
def test_bad_arguments():
    options = dict(group=dist.group.WORLD)
    column = partial(partial, ColumnParallelLinear, **options)
    row = partial(partial, RowParallelLinear, **options)
    attention = partial(partial, ParallelSelfAttention, **options)
    block = partial(partial, ParallelTransformerBlock, **options)
    assert_refused(column(4, 4, activation="tanh"), ValueError, "activation", "'tanh'")
    mlp = partial(ParallelMLP, 4, 4, activation="swish", **options)
    assert_refused(mlp, ValueError, "activation", "'swish'")
    assert_refused(column(4, 7, activation="geglu"), ValueError, "out_features=7", "geglu")
    assert_refused(row(0, 4), ValueError, "in_features", "0")
    assert_refused(column(4, 4.0), ValueError, "out_features", "4.0")
    assert_refused(attention(16, 9), ValueError, "hidden_size=16", "num_heads=9")
    assert_refused(attention(18, 9, 2), ValueError, "num_kv_heads=2", "num_heads=9")
    assert_refused(attention(18, 2), ValueError, "2 attention heads", "3 ranks")
    assert_refused(block(18, 2), ValueError, "2 attention heads", "3 ranks")
    assert_refused(block(18, 9, norm="batchnorm"), ValueError, "norm", "'batchnorm'", "rmsnorm")
    with_norm = partial(row(4, 4, skip_bias_add=True)(), torch.ones(1, 2), norm=RMSNorm(4))
    assert_refused(with_norm, ValueError, "norm", "skip_bias_add=True")
    embedding = partial(ColumnParallelLinear.from_linear, nn.Embedding(4, 4), **options)
    assert_refused(embedding, TypeError, "linear", "Embedding")
    sequence = row(4, 4, sequence_parallel=True)
    assert_refused(sequence, NotImplementedError, "sequence_parallel=True")


TAKES_A_GROUP = {
    "column": partial(ColumnParallelLinear, 4, 4),
    "row": partial(RowParallelLinear, 4, 4),
    "embedding": partial(VocabParallelEmbedding, 4, 4),
    "attention": partial(ParallelSelfAttention, 4, 4),
    "function": partial(tpf.row_parallel_linear, torch.zeros(1, 4), torch.zeros(4, 4)),
    "all_reduce_": partial(tpk.all_reduce_, torch.zeros(3)),
}


@pytest.mark.parametrize("name", TAKES_A_GROUP)
@run_on_ranks(2)
def test_no_mesh_and_groups_of_others(name):
    make = TAKES_A_GROUP[name]
    no_mesh = partial(make, group=None)
    assert_refused(no_mesh, ValueError, "group=None", "init_mesh", "made none")
    others = dist.new_group([1])
    if dist.get_rank() == 0:
        outside = partial(make, group=others)
        assert_refused(outside, ValueError, "group", "does not contain", "rank 0")


@run_on_ranks(2)
def test_bad_groups():
    column, row = TAKES_A_GROUP["column"], TAKES_A_GROUP["row"]
    size = dist.get_world_size()
    mesh = tpk.init_mesh(tp=size)
    assert_refused(partial(row, group="tp"), TypeError, "group", "str")
    assert_refused(partial(row, group=1), TypeError, "group", "int")
    two_dimensions = partial(column, group=mesh)
    assert_refused(two_dimensions, ValueError, "group", "('dp', 'tp')", "mesh['tp']")
    column(group=None)  # the mesh's tp group, from here on
    tpk.init_mesh(tp=1, dp=size)
    assert_refused(partial(column, group=None), ValueError, "group=None", "2 meshes")


@run_on_ranks(2)
def test_a_mesh_of_a_former_world_is_none():
    """The groups of init_mesh end with destroy_process_group; the next world may reuse names."""
    tpk.init_mesh(tp=dist.get_world_size())
    rank, size = dist.get_rank(), dist.get_world_size()
    root = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("again", root), rank=rank, world_size=size
    )
    call = lambda: ColumnParallelLinear(4, 4), ValueError, "group=None", "made none"
    assert_refused(*call)
    dist.new_group([0])
    dist.new_group([1])
    assert_refused(*call)


@run_on_ranks(2)
def test_bad_meshes():
    for bad in (0, -1, True, 2.0):
        assert_refused(lambda bad=bad: tpk.init_mesh(bad), ValueError, "tp", repr(bad))
    assert_refused(lambda: tpk.init_mesh(tp=3), ValueError, "tp=3", "this job has 2")
    assert_refused(lambda: tpk.init_mesh(tp=1), ValueError, "tp=1", "this job has 2")
    assert_refused(lambda: tpk.init_mesh(tp=2, dp=0), ValueError, "dp", "0")
    assert_refused(
        lambda: tpk.init_mesh(tp=2, dp=2), ValueError, "tp=2 * dp=2 is 4 ranks, but this job has 2"
    )
    assert_refused(lambda: tpk.init_mesh(tp=2, device="tpu"), ValueError, "device", "'tpu'")


def wrong_input():
    ColumnParallelLinear(4, 4, group=dist.group.WORLD)(torch.zeros(2, 5))


def fine():
    layer = ColumnParallelLinear(4, 4, group=dist.group.WORLD, gather_output=True)
    x = torch.randn(2, 4)
    whole = tpk.unsharded_state_dict(layer)
    return torch.allclose(layer(x), F.linear(x, whole["weight"], whole["bias"]))


def test_a_mistake_on_all_ranks_ends_the_job_and_leaves_the_next_alone(pool):
    pool.run(3, fine)
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ValueError: input has shape \(2, 5\)"):
        pool.run(3, wrong_input)
    assert all(pool.run(3, fine))
    assert time.monotonic() - start < 8
