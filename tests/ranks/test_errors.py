"""Mistakes that every rank can see raise the same exception on all, before any communication."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from refusal import assert_refused, refusals
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

COLUMN, ROW = (7, 18), (18, 7)  # this rank's weights, of 18 features in and out


def bad_tensors():
    group = dist.group.WORLD
    x, w_column, w_row, half = (
        torch.zeros(4, 18),
        torch.zeros(COLUMN),
        torch.zeros(ROW),
        torch.bfloat16,
    )

    def column(x=x, w=w_column, b=None, **options):
        return lambda: tpf.column_parallel_linear(x, w, b, **{"group": group, **options})

    def row(x=x[:, :7], w=w_row, b=None, **options):
        return lambda: tpf.row_parallel_linear(x, w, b, **{"group": group, **options})

    layer = RowParallelLinear(18, 18, group=group)
    return refusals(
        {
            "column features": column(x[:, :17]),
            "row features": row(x),
            "layer features": lambda: layer(torch.zeros(4, 11)),
            "0-d input": column(torch.tensor(1.0)),
            "row, 0-d whole input": row(torch.tensor(1.0), input_is_parallel=False),
            "1-d weight": column(w=torch.zeros(18)),
            "column weight dtype": column(w=w_column.to(half)),
            "row weight dtype": row(w=w_row.to(half)),
            "bias dtype": row(b=torch.zeros(18, dtype=half)),
            "layer dtype": lambda: layer(torch.zeros(4, 6, dtype=half)),
            "weight device": column(w=w_column.to("meta")),
            "column integer input": column(x.long()),
            "row integer input": row(x[:, :7].int()),
            "column bias": column(b=torch.zeros(8)),
            "column bias of one": column(b=torch.zeros(1)),
            "row bias": row(b=torch.zeros(17)),
            "residual": row(residual=torch.zeros(4, 17)),
            "residual of fewer dimensions": row(residual=torch.zeros(18)),
            "activation": column(activation="tanh"),
            "odd gated": column(activation="swiglu"),
            "overlap": row(overlap=True),
            "column overlap": column(overlap="yes"),
            "bias_act": lambda: tpf.bias_act(x, torch.zeros(17), "gelu"),
            "requires grad": lambda: tpk.all_reduce_(torch.zeros(3, requires_grad=True), group),
        }
    )


def test_bad_tensors(pool):
    expected = {
        "column features": (
            ValueError,
            "input has shape (4, 17)",
            "weight is (7, 18)",
            "must be 18",
        ),
        "row features": (
            ValueError,
            "input has shape (4, 18)",
            "weight is (18, 7)",
            "input_is_parallel",
        ),
        "layer features": (ValueError, "input has shape (4, 11)", "weight is (18, 6)"),
        "0-d input": (ValueError, "input has shape ()"),
        "row, 0-d whole input": (ValueError, "input has shape ()"),
        "1-d weight": (ValueError, "weight is (18,)"),
        "column weight dtype": (TypeError, "weight is torch.bfloat16", "input is torch.float32"),
        "row weight dtype": (TypeError, "weight is torch.bfloat16", "input is torch.float32"),
        "bias dtype": (TypeError, "bias is torch.bfloat16", "input is torch.float32"),
        "layer dtype": (TypeError, "weight is torch.float32", "input is torch.bfloat16"),
        "weight device": (ValueError, "weight is on meta", "input is on cpu"),
        "column integer input": (TypeError, "input", "torch.int64"),
        "row integer input": (TypeError, "input", "torch.int32"),
        "column bias": (ValueError, "bias has shape (8,)", "7"),
        "column bias of one": (ValueError, "bias has shape (1,)", "7"),
        "row bias": (ValueError, "bias has shape (17,)", "18"),
        "residual": (ValueError, "residual has shape (4, 17)", "(4, 18)"),
        "residual of fewer dimensions": (ValueError, "residual has shape (18,)", "(4, 18)"),
        "activation": (ValueError, "activation", "'tanh'", "swiglu"),
        "odd gated": (ValueError, "swiglu", "7"),
        "overlap": (ValueError, "overlap", "True"),
        "column overlap": (ValueError, "overlap", "'yes'"),
        "bias_act": (ValueError, "bias", "(17,)", "18"),
        "requires grad": (ValueError, "tensor", "requires grad"),
    }
    assert_refused(pool.run(3, bad_tensors), expected)


def whole_input_of_another_size():
    weight = torch.zeros(18, 6)  # on three ranks: 18 input features
    return refusals(
        {
            "17": lambda: tpf.row_parallel_linear(
                torch.zeros(4, 17), weight, group=dist.group.WORLD, input_is_parallel=False
            )
        }
    )


def test_whole_input_of_another_size(pool):
    """ShardSpec like torch.chunk does, 17 features would fit the first two ranks."""
    assert_refused(
        pool.run(3, whole_input_of_another_size), {"17": (ValueError, "input", "17", "18")}
    )


def bad_arguments():
    options = dict(group=dist.group.WORLD)
    calls = {
        f"overlap={bad!r}": lambda bad=bad: ColumnParallelLinear(4, 4, overlap=bad, **options)
        for bad in (True, 0, -1, "yes", 1.5, None)
    }
    return refusals(
        calls
        | {
            "row overlap": lambda: RowParallelLinear.from_linear(
                nn.Linear(4, 4), overlap=0, **options
            ),
            "activation": lambda: ColumnParallelLinear(4, 4, activation="tanh", **options),
            "mlp activation": lambda: ParallelMLP(4, 4, activation="swish", **options),
            "odd gated": lambda: ColumnParallelLinear(4, 7, activation="geglu", **options),
            "no features": lambda: RowParallelLinear(0, 4, **options),
            "features type": lambda: ColumnParallelLinear(4, 4.0, **options),
            "hidden_size": lambda: ParallelSelfAttention(16, 9, **options),
            "kv heads": lambda: ParallelSelfAttention(18, 9, 2, **options),
            "ranks": lambda: ParallelSelfAttention(18, 2, **options),
            "block's ranks": lambda: ParallelTransformerBlock(18, 2, **options),
            "norm": lambda: ParallelTransformerBlock(18, 9, norm="batchnorm", **options),
            "norm without the bias": lambda: RowParallelLinear(4, 4, skip_bias_add=True, **options)(
                torch.ones(1, 2), norm=RMSNorm(4)
            ),
            "not a linear": lambda: ColumnParallelLinear.from_linear(nn.Embedding(4, 4), **options),
            "sequence_parallel": lambda: RowParallelLinear(4, 4, sequence_parallel=True, **options),
        }
    )


def test_bad_arguments(pool):
    expected = {
        f"overlap={bad!r}": (ValueError, "overlap", repr(bad))
        for bad in (True, 0, -1, "yes", 1.5, None)
    } | {
        "row overlap": (ValueError, "overlap", "0"),
        "activation": (ValueError, "activation", "'tanh'"),
        "mlp activation": (ValueError, "activation", "'swish'"),
        "odd gated": (ValueError, "out_features=7", "geglu"),
        "no features": (ValueError, "in_features", "0"),
        "features type": (ValueError, "out_features", "4.0"),
        "hidden_size": (ValueError, "hidden_size=16", "num_heads=9"),
        "kv heads": (ValueError, "num_kv_heads=2", "num_heads=9"),
        "ranks": (ValueError, "2 attention heads", "3 ranks"),
        "block's ranks": (ValueError, "2 attention heads", "3 ranks"),
        "norm": (ValueError, "norm", "'batchnorm'", "rmsnorm"),
        "norm without the bias": (ValueError, "norm", "skip_bias_add=True"),
        "not a linear": (TypeError, "linear", "Embedding"),
        "sequence_parallel": (NotImplementedError, "sequence_parallel=True"),
    }
    assert_refused(pool.run(3, bad_arguments), expected)


def bad_groups():
    others = dist.new_group([dist.get_world_size() - 1])
    makers = {
        "column": lambda group: ColumnParallelLinear(4, 4, group=group),
        "row": lambda group: RowParallelLinear(4, 4, group=group),
        "embedding": lambda group: VocabParallelEmbedding(4, 4, group=group),
        "attention": lambda group: ParallelSelfAttention(4, 4, group=group),
        "function": lambda group: tpf.row_parallel_linear(
            torch.zeros(1, 4), torch.zeros(4, 4), group=group
        ),
        "all_reduce_": lambda group: tpk.all_reduce_(torch.zeros(3), group),
    }
    calls = {f"{name}, no mesh": lambda make=make: make(None) for name, make in makers.items()}
    if others is dist.GroupMember.NON_GROUP_MEMBER:
        calls |= {
            f"{name}, not in it": lambda make=make: make(others) for name, make in makers.items()
        }
    seen = refusals(
        calls | {"a name": lambda: makers["row"]("tp"), "a number": lambda: makers["row"](1)}
    )
    mesh = tpk.init_mesh(tp=dist.get_world_size())
    seen |= refusals({"2-D mesh": lambda: makers["column"](mesh)})
    makers["column"](None)  # the mesh's tp group, from here on
    tpk.init_mesh(tp=1, dp=dist.get_world_size())
    return seen | refusals({"two meshes": lambda: makers["column"](None)})


def test_bad_groups(pool):
    names = ("column", "row", "embedding", "attention", "function", "all_reduce_")
    expected = {
        f"{name}, no mesh": (ValueError, "group=None", "init_mesh", "made none") for name in names
    } | {
        "a name": (TypeError, "group", "str"),
        "a number": (TypeError, "group", "int"),
        "2-D mesh": (ValueError, "group", "('dp', 'tp')", "mesh['tp']"),
        "two meshes": (ValueError, "group=None", "2 meshes"),
    }
    *outside, inside = pool.run(2, bad_groups)
    assert_refused([inside], expected)
    assert_refused(
        outside,
        expected
        | {
            f"{name}, not in it": (ValueError, "group", "does not contain", "rank 0")
            for name in names
        },
    )


def a_mesh_of_a_former_world():
    """init_mesh's groups end with destroy_process_group; the next world's may have their names."""
    tpk.init_mesh(tp=dist.get_world_size())
    rank, size = dist.get_rank(), dist.get_world_size()
    root = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("again", root), rank=rank, world_size=size
    )
    before = refusals({"no mesh": lambda: ColumnParallelLinear(4, 4)})
    dist.new_group([0])
    dist.new_group([1])
    return before | refusals({"other groups": lambda: ColumnParallelLinear(4, 4)})


def test_a_mesh_of_a_former_world_is_none(pool):
    expected = dict.fromkeys(("no mesh", "other groups"), (ValueError, "group=None", "made none"))
    assert_refused(pool.run(2, a_mesh_of_a_former_world), expected)


def bad_meshes():
    calls = {f"tp={bad!r}": lambda bad=bad: tpk.init_mesh(bad) for bad in (0, -1, True, 2.0)}
    return refusals(
        calls
        | {
            "too many": lambda: tpk.init_mesh(tp=3),
            "too few": lambda: tpk.init_mesh(tp=1),
            "dp": lambda: tpk.init_mesh(tp=2, dp=0),
            "product": lambda: tpk.init_mesh(tp=2, dp=2),
            "device": lambda: tpk.init_mesh(tp=2, device="tpu"),
        }
    )


def test_bad_meshes(pool):
    expected = {f"tp={bad!r}": (ValueError, "tp", repr(bad)) for bad in (0, -1, True, 2.0)} | {
        "too many": (ValueError, "tp=3", "this job has 2"),
        "too few": (ValueError, "tp=1", "this job has 2"),
        "dp": (ValueError, "dp", "0"),
        "product": (ValueError, "tp=2 * dp=2 is 4 ranks", "2"),
        "device": (ValueError, "device", "'tpu'"),
    }
    assert_refused(pool.run(2, bad_meshes), expected)


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
