"""The registered ops: what torch.library.opcheck says, their fake kernels and their log, and the public all-reduce."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

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

ops = torch.ops.tpkernels
# Not test_autograd_registration: it passes without looking where nothing requires a gradient, and where something does it asks for
# an autograd kernel, which the ops have not: they are called from autograd.Functions, below autograd.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def samples():
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    rng = torch.Generator().manual_seed(rank)

    def rand(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=rng).to(dtype)

    yes, no = [True] * 2, [False] * 2
    dys, weights = [rand(2, 35, 4), rand(2, 35, 3)], [rand(4, 6), rand(3, 6)]
    ids, target = torch.tensor([[0, 4, 9], [9, 5, 4]]), torch.tensor([0, 9, -100, 5, 4, 3])
    return {
        "row_linear": [
            (rand(2, 35, 4), rand(6, 4), rand(6), rand(2, 35, 6), group, 3, "row_forward"),
            (
                rand(5, 4, dtype=torch.bfloat16).t(),
                rand(6, 5, dtype=torch.bfloat16),
                None,
                None,
                group,
                1,
                "row_forward",
            ),
            (rand(4), rand(6, 4), rand(6), None, group, 2, "row_forward"),
        ],
        "linear": [
            (rand(2, 35, 4), rand(6, 4), rand(6), True),
            (rand(4), rand(6, 4), None, False),
            (rand(4, 3).t(), rand(6, 4), None, True),
        ],
        "row_linear_backward": [
            (rand(2, 35, 6), rand(2, 35, 4), rand(6, 4), True),
            (rand(6), rand(4), None, True),
            (rand(3, 6), None, rand(6, 4), False),
        ],
        "column_linear_backward": [
            (dys, rand(2, 35, 6), weights, True, yes, yes, group, 3, "column_backward"),
            (dys, rand(2, 35, 6), [], False, yes, no, group, 1, "column_backward"),
            (dys, None, weights, True, no, [False, True], group, 2, "column_backward"),
        ],
        "all_reduce_": [
            (rand(3, 4), group, "sum", "x"),
            (rand(3, 4).t(), group, "max", "x"),
            (torch.arange(5), group, "sum", "x"),
        ],
        "all_gather": [
            (rand(3, 4), group, "x"),
            (rand(3, 4).t(), group, "x"),
            (torch.arange(5), group, "x"),
        ],
        "vocab_embedding": [
            (ids, rand(5, 4), 5 * rank, group, "embedding"),
            (ids[0].int(), rand(5 - 5 * rank, 4), 0, group, "embedding"),
        ],
        "empty_comm_buffer": [(rand(3), [2, 4])],
        "row_linear_rms_norm": [
            (
                rand(2, 35, 4),
                rand(6, 4),
                rand(6),
                rand(2, 35, 6),
                rand(6),
                1e-5,
                group,
                3,
                "row_forward",
            ),
            (
                rand(5, 4, dtype=torch.bfloat16),
                rand(6, 4, dtype=torch.bfloat16),
                None,
                None,
                rand(6),
                1e-5,
                group,
                1,
                "row_forward",
            ),
        ],
        "vocab_ce": [
            (rand(6, 5), target, 5 * rank, 10, -100, smoothing, group, "loss")
            for smoothing in (0.0, 0.1)
        ],
        "vocab_linear_ce": [
            (
                rand(6, 4),
                rand(5, 4),
                rand(5),
                target,
                rand(6),
                5 * rank,
                10,
                -100,
                0.1,
                4,
                True,
                True,
                True,
                group,
                "loss",
            ),
            (
                *(rand(*s, dtype=torch.bfloat16) for s in ((6, 4), (5, 4))),
                None,
                target,
                rand(6),
                5 * rank,
                10,
                -100,
                0.0,
                9,
                False,
                True,
                False,
                group,
                "loss",
            ),
            (
                rand(6, 4),
                rand(5, 4),
                rand(5),
                target,
                None,
                5 * rank,
                10,
                -100,
                0.0,
                2,
                False,
                False,
                False,
                group,
                "loss",
            ),
        ],
        "vocab_ce_stats": [
            (rand(6, 5), target, 5),
            (rand(5, 6, dtype=torch.bfloat16).t(), target, 5),
            (rand(6, 0), target, 0),
        ],
        "vocab_ce_grad": [
            (rand(6, 5, dtype=dtype), target, rand(6), rand(6), 5, 0.1, 10)
            for dtype in (torch.float32, torch.bfloat16)
        ],
        "vocab_ce_grad_": [(rand(6, 5), target, rand(6), rand(6), 5, 0.1, 10)],
        "bias_act": [
            (rand(2, 3, 8), rand(8), "gelu"),
            (rand(8, 3).t(), None, "swiglu"),
            (rand(3, 8, dtype=torch.bfloat16), rand(8), "relu2"),
        ],
        "bias_act_backward": [
            (rand(2, 3, 8), rand(2, 3, 8), rand(8), "gelu", True),
            (rand(3, 4), rand(3, 8), None, "swiglu", False),
        ],
        "gated_act": [
            (rand(2, 3, 4), rand(2, 3, 4), rand(4), rand(4), "geglu"),
            (rand(3, 8)[:, :4], rand(3, 8)[:, 4:], None, None, "swiglu"),
        ],
        "gated_act_backward": [
            (rand(3, 4), rand(3, 4), rand(3, 4), rand(4), rand(4), "geglu", True),
            (rand(3, 4), rand(3, 8)[:, :4], rand(3, 8)[:, 4:], None, None, "swiglu", False),
        ],
        "column_linear_act": [
            (rand(2, 3, 4), rand(6, 4), rand(6), "swiglu", True),
            (rand(3, 4), rand(6, 4), None, "gelu", False),
        ],
        "norm": [
            (rand(2, 3, 4), rand(2, 3, 4), rand(4), rand(4), 1e-5, False),
            (rand(4, 3).t(), None, None, None, 1e-5, True),
            (rand(3, 4, dtype=torch.bfloat16), None, rand(4), None, 1e-5, True),
        ],
        "norm_backward": [
            (
                rand(2, 3, 4),
                rand(2, 3, 4),
                rand(2, 3, 4),
                rand(4),
                rand(6),
                rand(6),
                False,
                True,
                True,
            ),
            (rand(3, 4), None, rand(3, 4), None, rand(0), rand(3), True, False, False),
        ],
        "dropout": [
            (rand(2, 3, 4), torch.tensor([7]), 0.3, 2, 5),
            (rand(4, 3).t(), torch.tensor([7]), 1.0, 0, 0),
        ],
        "rotary": [
            (rand(2, 3, 5, 8), rand(5, 4), rand(5, 4), False, False),
            (rand(2, 5, 3, 8).transpose(1, 2), rand(2, 5, 3), rand(2, 5, 3), True, True),
        ],
    }


def opcheck(part):
    """Of every third op: a call's time is bounded."""
    for name, calls in list(samples().items())[part::3]:
        # An uninitialised buffer has no values to compare between two runs.
        checks = ("test_schema", "test_faketensor") if name == "empty_comm_buffer" else CHECKS
        for args in calls:
            result = torch.library.opcheck(getattr(ops, name).default, args, test_utils=checks)
            assert set(result.values()) == {"SUCCESS"}, (name, result)


def every_op_has_samples():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tpkernels::")
    }
    return registered ^ samples().keys()


@pytest.mark.parametrize("part", range(3))
def test_opcheck(pool, part):
    pool.run(2, opcheck, part)


def test_every_op_is_checked(pool):
    # A view of its input or a copy, which no schema says; what is called from C++ alone; what only GPUs have.
    assert pool.run(1, every_op_has_samples) == [
        {"autocast_to", "add_bias_residual_", "open_peer_memory"}
    ]


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


def fake_log_is_the_real_one():
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


def test_fake_log_is_the_real_one(pool):
    pool.run(2, fake_log_is_the_real_one)


@pytest.fixture
def rank_0_of_512():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_pair_traced_on_rank_0_of_512(rank_0_of_512):
    """Sizes whose memory no machine has: an allocation would fail."""
    rows, hidden, ffn, itemsize = 2**21 + 77, 2**20, 2**22, 2
    assert rows * hidden * itemsize > 2**41
    with FakeTensorMode(), tpk.log_collectives() as log:
        options = dict(group=rank_0_of_512, dtype=torch.bfloat16)
        column = ColumnParallelLinear(hidden, ffn, overlap=4, **options)
        row = RowParallelLinear(ffn, hidden, overlap=3, **options)
        x = torch.empty(rows, hidden, dtype=torch.bfloat16, requires_grad=True)
        out = row(column(x))
        out.sum().backward()
    assert column.weight.shape == (ffn // 512, hidden) and row.weight.shape == (hidden, ffn // 512)
    assert all(
        isinstance(t, FakeTensor)
        for t in (out, x.grad, column.weight, column.weight.grad, row.weight.grad, row.bias.grad)
    )
    assert (out.shape, x.grad.shape, column.weight.grad.shape) == (
        x.shape,
        x.shape,
        column.weight.shape,
    )
    formula = []
    for tag, chunks in (("row_forward", 3), ("column_backward", 4)):
        tiles = math.ceil(rows / 128)  # the last one ragged
        weights = {3: (1, 2, 1), 4: (1, 2, 2, 1)}[chunks]
        ends = [
            128 * math.floor(Fraction(tiles * weight, sum(weights)) + Fraction(1, 2))
            for weight in itertools.accumulate(weights)
        ]
        sizes = [b - a for a, b in zip([0, *ends], [*ends[:-1], rows], strict=False)]
        formula += [
            ("all_reduce", tag, size * hidden * itemsize, i, chunks) for i, size in enumerate(sizes)
        ]
    assert [(c.op, c.tag, c.bytes, c.chunk, c.chunks) for c in log] == formula
    assert sum(c.bytes for c in log) == 2 * rows * hidden * itemsize


def all_reduces():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    total = sum(range(1, world + 1))
    base = torch.arange(24).view(4, 6)
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.int8,
    ):
        for view in (
            lambda t: t,
            lambda t: t.t(),
            lambda t: t[:, 1::2],
            lambda t: t[2],
            lambda t: t[0, 0],
        ):
            whole = (base.to(dtype) * 0 + 1) * (rank + 1)
            tensor = view(whole)
            with tpk.log_collectives() as log:
                assert tpk.all_reduce_(tensor, group) is tensor
            assert [(c.op, c.tag, c.bytes, c.chunk, c.chunks) for c in log] == [
                ("all_reduce", "all_reduce", tensor.nbytes, 0, 1)
            ]
            want = torch.full((4, 6), rank + 1, dtype=dtype)
            view(want).fill_(total)
            assert_close(whole, want, atol=0, rtol=0)  # in place, and nothing beside it
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad.*detach"):
        tpk.all_reduce_(leaf, group)
    with torch.no_grad():
        tpk.all_reduce_(leaf, group)
    assert leaf.tolist() == [world] * 3
    with tpk.log_collectives() as log:
        tpk.all_reduce_(torch.empty(0, 3), group)
    assert not log


def test_all_reduce(pool):
    pool.run(3, all_reduces)


def log_survives():
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
        ops.all_reduce_(torch.ones(3), group.group_name, "min", "x")


def test_the_log_ends_with_its_block_and_does_not_nest(pool):
    pool.run(2, log_survives)
