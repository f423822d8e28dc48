"""The parallel layers against the same layers on a group of one rank, and against the numerics rule."""

from functools import partial

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import count_all_reduces
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels import _C
from tpkernels.nn import (
    ColumnParallelLinear,
    ParallelMLP,
    ParallelSelfAttention,
    ParallelTransformerBlock,
    RowParallelLinear,
)
from tpkernels.ops import column_linear, linear, row_linear
from tpkernels.ops.activation import ACTIVATIONS, GATED
from tpkernels.sharding.spec import ShardSpec

EXACT = dict(atol=0, rtol=0)
WHOLE = {  # modules whose input and output are whole on every rank, with 18 features in and out
    "column": lambda **o: ColumnParallelLinear(18, 23, gather_output=True, **o),
    "column swiglu": lambda **o: ColumnParallelLinear(
        18, 22, gather_output=True, activation="swiglu", bias=False, **o
    ),
    "row": lambda **o: RowParallelLinear(18, 23, input_is_parallel=False, **o),
    "row in 3 chunks": lambda **o: RowParallelLinear(
        18, 23, False, input_is_parallel=False, overlap=3, **o
    ),
    **{
        f"mlp {a}": lambda a=a, **o: ParallelMLP(18, 27, activation=a, overlap=2, **o)
        for a in [*ACTIVATIONS, *GATED]
    },
    "mlp without bias": lambda **o: ParallelMLP(18, 3, bias=False, **o),
    "attention 9": lambda **o: ParallelSelfAttention(18, 9, **o),
    "attention 9/3": lambda **o: ParallelSelfAttention(18, 9, 3, overlap=2, **o),
    "attention 9/1": lambda **o: ParallelSelfAttention(18, 9, 1, **o),
    "attention 10/2": lambda **o: ParallelSelfAttention(
        18, 10, 2, head_dim=4, bias=False, causal=False, **o
    ),
    "block layernorm": lambda **o: ParallelTransformerBlock(18, 9, **o),
    "block rmsnorm": lambda **o: ParallelTransformerBlock(
        18, 9, 27, 3, norm="rmsnorm", activation="swiglu", bias=False, overlap=2, **o
    ),
}


def group_of_one():
    return [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]


def seeded(make, **options):
    torch.manual_seed(7)
    return make(**options)


def twins(name, alone):
    """The module over all ranks and the one over one rank, from one seed; the weights are the same bits."""
    split, whole = (seeded(WHOLE[name], group=group) for group in (dist.group.WORLD, alone))
    assert_close(dict(tpk.unsharded_state_dict(split)), dict(whole.state_dict()), **EXACT)
    return split, whole


def assert_near(ours, want, tolerance=2e-5):
    assert ours.shape == want.shape
    error = (ours - want).abs().max() / want.abs().max() if want.numel() else 0.0
    assert error < tolerance, f"{error:.1e}"


def assert_same_grads(want, split):
    """`want`: the unsplit gradients by name. Relative to a parameter's largest, or the module's where the true gradient is zero: a
    softmax does not see a bias of the keys."""
    grads = tpk.unsharded_gradients(split)
    assert grads.keys() == want.keys()
    largest = max(grad.abs().max() for grad in want.values())
    for name, grad in want.items():
        error = (grads[name] - grad).abs().max() / (
            largest if name.endswith("k_proj.bias") else grad.abs().max()
        )
        assert error < 2e-5, f"{name}: {error:.1e}"


def assert_same_run(split, whole, x, *inputs):
    """Outputs, the input's gradient and the parameters' gradients."""
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = split(mine, *inputs), whole(theirs, *inputs)
    assert_near(out, want)
    dy = torch.randn_like(want)
    out.backward(dy)
    want.backward(dy)
    assert_near(mine.grad, theirs.grad)
    assert_same_grads({name: p.grad for name, p in whole.named_parameters()}, split)


def equal_to_one_rank():
    alone = group_of_one()
    for name in WHOLE:
        split, whole = twins(name, alone)
        assert_same_run(split, whole, torch.randn(2, 35, 18))
        whole.zero_grad()
        split.zero_grad()
        whole.eval()
        split.eval()
        assert_same_run(split, whole, torch.randn(1, 3, 18))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_one_rank(pool, ranks):
    pool.run(ranks, equal_to_one_rank)


def attention_masks():
    alone = group_of_one()
    for name in ("attention 9", "attention 9/3", "attention 9/1", "block rmsnorm"):
        split, whole = twins(name, alone)
        x = torch.randn(2, 5, 18)
        keep = torch.rand(2, 1, 5, 5) < 0.7
        keep |= torch.eye(5, dtype=torch.bool)
        for mask in (keep, torch.randn(5, 5)):
            assert_same_run(split, whole, x, mask)
        with torch.no_grad():  # a mask takes the place of the causal one
            everything = split(x, torch.ones(5, 5, dtype=torch.bool))
            assert (everything - split(x)).abs().max() > 1e-3


def test_attention_masks(pool):
    pool.run(4, attention_masks)


def written_out(p, x, heads, kv_heads, norm, activation):
    """A pre-norm block in plain torch, from its state dict."""

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def normed(name, x):
        if norm == "layernorm":
            return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * p[f"{name}.weight"]

    y = normed("attention_norm", x)
    q, k, v = (
        linear(f"attention.{n}_proj", y).unflatten(-1, (-1, x.shape[-1] // heads)).transpose(1, 2)
        for n in "qkv"
    )
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
    x = x + linear("attention.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + linear(
        "mlp.fc2", reference.bias_act(linear("mlp.fc1", normed("mlp_norm", x)), None, activation)
    )


def blocks_written_out():
    x = torch.randn(2, 7, 18)
    for kv_heads, norm, activation in (
        (9, "layernorm", "gelu"),
        (3, "rmsnorm", "swiglu"),
        (1, "rmsnorm", "relu2"),
    ):
        block = ParallelTransformerBlock(
            18, 9, 27, kv_heads, norm=norm, activation=activation, group=dist.group.WORLD
        )
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand(18))
        leaves = {name: p.requires_grad_() for name, p in tpk.unsharded_state_dict(block).items()}
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, want = block(mine), written_out(leaves, theirs, 9, kv_heads, norm, activation)
        assert_near(out, want)
        dy = torch.randn_like(want)
        out.backward(dy)
        want.backward(dy)
        assert_near(mine.grad, theirs.grad)
        assert_same_grads({name: p.grad for name, p in leaves.items()}, block)


def test_a_block_written_out_in_plain_torch(pool):
    pool.run(2, blocks_written_out)


def the_stock_initialisation():
    group = dist.group.WORLD
    for shape in ((18, 23), (5, 3)):
        stock = seeded(partial(nn.Linear, *shape))
        for kind in (ColumnParallelLinear, RowParallelLinear):
            for layer in (
                seeded(partial(kind, *shape), group=group),
                kind.from_linear(stock, group=group),
            ):
                assert_close(
                    dict(tpk.unsharded_state_dict(layer)), dict(stock.state_dict()), **EXACT
                )


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_seed_gives_nn_linears_weights(pool, ranks):
    pool.run(ranks, the_stock_initialisation)


def from_linear():
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 23)
    stock.weight.requires_grad_(False)
    stock.eval()
    before = stock.weight.clone()
    for kind in (ColumnParallelLinear, RowParallelLinear):
        layer = kind.from_linear(stock, group=group)
        assert not layer.training and not layer.weight.requires_grad and layer.bias.requires_grad
        assert (
            layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
        )  # does not keep the whole weight alive
        with torch.no_grad():
            layer.weight.zero_()
        assert torch.equal(stock.weight, before)
    x, bare = torch.randn(4, 18), nn.Linear(18, 24, bias=False)
    gated = ColumnParallelLinear.from_linear(
        bare, group=group, activation="geglu", gather_output=True
    )
    assert_near(gated(x), reference.bias_act(bare(x), None, "geglu"))
    halves = ColumnParallelLinear.from_linear(bare, group=group, activation="geglu")
    assert_near(
        halves(x), halves.output_spec.shard(reference.bias_act(bare(x), None, "geglu"), rank)
    )
    assert halves.bias is None


def test_from_linear(pool):
    pool.run(3, from_linear)


def row_options():
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 23)
    x, residual = torch.randn(2, 35, 18), torch.randn(2, 35, 23)
    for overlap in (False, 3):
        layer = RowParallelLinear.from_linear(stock, group=group, overlap=overlap)
        mine = layer.input_spec.shard(x, rank)
        assert_near(layer(mine), stock(x))
        assert_near(layer(mine, residual), stock(x) + residual)
        assert_near(
            layer(mine, residual.double()), stock(x) + residual.double()
        )  # promotes, as + does
        whole = RowParallelLinear.from_linear(
            stock, group=group, overlap=overlap, input_is_parallel=False
        )
        assert_close(whole(x, residual), layer(mine, residual), **EXACT)
        skipping = RowParallelLinear.from_linear(
            stock, group=group, overlap=overlap, skip_bias_add=True
        )
        for rest in (None, residual):
            out, bias = skipping(mine, rest)
            assert bias is skipping.bias
            assert_near(out + bias, stock(x) if rest is None else stock(x) + rest)
        out, bias = RowParallelLinear(18, 23, False, group=group, skip_bias_add=True)(mine)
        assert bias is None
    out = layer(mine, residual)
    others = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(others, out.detach())
    assert all(torch.equal(out, other) for other in others)


@pytest.mark.parametrize("ranks", [1, 3])
def test_row_options(pool, ranks):
    pool.run(ranks, row_options)


def inputs_of_any_shape():
    alone = group_of_one()
    for name in ("column", "row in 3 chunks", "mlp gelu"):
        split, whole = twins(name, alone)
        rows = torch.randn(18, 35)
        strided = torch.randn(35, 40)[:, 3:39:2]
        for x in (
            torch.randn(18),
            torch.randn(1, 18),
            torch.randn(2, 3, 5, 18),
            torch.randn(0, 18),
            torch.randn(2, 0, 18),
            rows.t(),
            strided,
        ):
            split.zero_grad()
            whole.zero_grad()
            mine, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
            out, want = split(mine), whole(theirs)
            assert_near(out, want)
            out.sum().backward()  # a gradient that is not contiguous either
            want.sum().backward()
            assert_near(mine.grad, theirs.grad)
            for ours, grad in zip(
                tpk.unsharded_gradients(split).values(),
                (p.grad for p in whole.parameters()),
                strict=True,
            ):
                assert_close(ours, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 3])
def test_inputs_of_any_shape(pool, ranks):
    pool.run(ranks, inputs_of_any_shape)


def assert_as_accurate(name, ours, twin, wide):
    error, bound = (ours - wide).abs().max(), 2 * (twin - wide).abs().max() + 1e-6
    assert error < bound, (
        f"{name} {ours.dtype} on {dist.get_world_size()}: {error:.2e}, the twin's {bound:.2e}"
    )


def numerics(rows=70, k=333, n=35):
    """Against twins that add n partials of the dtype in rank order; wide: float32 for half precision, float64 for float32."""
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        x, w, b, residual = (
            torch.randn(*shape).to(dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))
        )
        features = ShardSpec.chunks(k, world, -1)
        xs, ws = ([features.shard(t, r) for r in range(world)] for t in (x, w))
        for chunks in (1, 3):
            for rest in (None, residual):
                out = tpf.row_parallel_linear(
                    xs[rank], ws[rank], b, group=group, residual=rest, overlap=chunks
                )
                args = (
                    [[t.to(d) for t in xs] for d in (dtype, wide)],
                    [[t.to(d) for t in ws] for d in (dtype, wide)],
                )
                twins = [
                    reference.row_linear(a, c, b.to(d), None if rest is None else rest.to(d))
                    for a, c, d in zip(*args, (dtype, wide), strict=True)
                ]
                assert_as_accurate("row", out, *twins)

            a, dy = (
                torch.randn(n, k).to(dtype).t(),
                torch.randn(rows, k).to(dtype),
            )  # [k, n]: k output features
            outputs, columns = ShardSpec.chunks(k, world), ShardSpec.chunks(k, world, -1)
            weights, dys = (
                [split.shard(t, r) for r in range(world)]
                for split, t in ((outputs, a), (columns, dy))
            )
            leaf = residual.clone().requires_grad_()
            y = tpf.column_parallel_linear(leaf, weights[rank], group=group, overlap=chunks)
            y.backward(dys[rank])
            twins = [
                reference.column_linear(residual.to(d), [t.to(d) for t in weights], [None] * world)[
                    rank
                ]
                for d in (dtype, wide)
            ]
            assert_as_accurate("column", y, *twins)
            twins = [
                reference.column_linear_input_grad(
                    [t.to(d) for t in dys], [t.to(d) for t in weights]
                )
                for d in (dtype, wide)
            ]
            assert_as_accurate("column's dx", leaf.grad, *twins)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_as_accurate_as_partials_in_rank_order(pool, ranks):
    pool.run(ranks, numerics)


def explanations():
    group, ranks = dist.group.WORLD, dist.get_world_size()
    for overlap, reason in (
        ("auto", "CPU"),
        (False, "overlap=False"),
        (3, "overlap=3 was asked for"),
    ):
        for layer, features in (
            (ColumnParallelLinear(18, 23, group=group, overlap=overlap), 18),
            (RowParallelLinear(18, 23, group=group, overlap=overlap), 23),
        ):
            text = layer.explain(450)
            bounds = _C.chunk_bounds(450, 3 if overlap == 3 and ranks > 1 else 1, features * 4)
            sizes = [str(b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
            assert f"{len(sizes)} chunk" in text and f"of {', '.join(sizes)} rows" in text
            assert f"{450 * features * 4:,} bytes" in text and f"over {ranks} ranks" in text
            assert (reason if ranks > 1 else "one rank") in text


@pytest.mark.parametrize("ranks", [1, 2])
def test_explain_says_the_chunks_and_why(pool, ranks):
    pool.run(ranks, explanations)


class Recorder:
    """Stands for torch.ops.tpkernels in tpkernels.ops.linear: notes what each op is called with and returns."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **options):
            result = getattr(torch.ops.tpkernels, name)(*args, **options)
            self.calls.append((name, args, result))
            return result

        return call

    def __enter__(self):
        column_linear._ops = linear._ops = row_linear._ops = self
        return self

    def __exit__(self, *_):
        column_linear._ops = linear._ops = row_linear._ops = torch.ops.tpkernels


def auto_is_one_chunk():
    x, dy, seen = torch.randn(2, 1200, 18), torch.randn(2, 1200, 18), []
    for overlap in ("auto", False):
        mlp = seeded(partial(ParallelMLP, 18, 27), group=dist.group.WORLD, overlap=overlap)
        leaf = x.clone().requires_grad_()
        with Recorder() as recorder, tpk.log_collectives() as log:
            out = mlp(leaf, x)
            out.backward(dy)
        seen.append([recorder.calls, out, leaf.grad, [p.grad for p in mlp.parameters()], log])
    for ours, theirs in zip(*map(tree_leaves, seen), strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
    reduced = [
        (name, *args[-2:])
        for name, args, _ in recorder.calls
        if name in ("row_linear", "column_linear_backward")
    ]
    assert reduced == [
        ("row_linear", 1, "row_forward"),
        ("column_linear_backward", 1, "column_backward"),
    ]


def test_auto_on_cpus_is_the_path_of_one_chunk(pool):
    pool.run(2, auto_is_one_chunk)


def gemms_and_collectives(run):
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        tpk.log_collectives() as log,
    ):
        run()
    return sum(
        e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")
    ), len(log)


def nothing_unneeded():
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 24)
    for frozen in ((), ("input",), ("weight",), ("weight", "bias"), ("input", "weight")):
        for kind in (ColumnParallelLinear, RowParallelLinear):
            layer = kind.from_linear(stock, group=group)
            x = torch.randn(6, 18)
            x = x if kind is ColumnParallelLinear else layer.input_spec.shard(x, rank).clone()
            x.requires_grad_("input" not in frozen)
            layer.weight.requires_grad_("weight" not in frozen)
            layer.bias.requires_grad_("bias" not in frozen)
            out = layer(x)
            with Recorder() as recorder:
                gemms, collectives = gemms_and_collectives(
                    lambda: out.backward(torch.ones_like(out))  # noqa: B023
                )
            wanted = {"input": x, "weight": layer.weight, "bias": layer.bias}
            assert {name for name, t in wanted.items() if t.grad is None} == set(frozen)
            assert gemms == 2 - ("input" in frozen) - ("weight" in frozen)
            assert collectives == (kind is ColumnParallelLinear and "input" not in frozen)
            assert all(len(result) == 3 - len(frozen) for _, _, result in recorder.calls)
    layer = ColumnParallelLinear.from_linear(stock, group=group)
    with torch.no_grad(), tpk.log_collectives() as log:
        assert not layer(torch.randn(6, 18)).requires_grad
    assert not log


def test_what_needs_no_gradient_is_neither_computed_nor_sent(pool):
    pool.run(2, nothing_unneeded)


def a_block_communicates_four_times():
    for kv_heads, norm in (
        (9, "layernorm"),
        (3, "rmsnorm"),
    ):  # the KV projections stay divided on 2 and 3 ranks
        block = ParallelTransformerBlock(18, 9, 27, kv_heads, norm=norm, group=dist.group.WORLD)
        x = torch.randn(2, 5, 18, requires_grad=True)
        with tpk.log_collectives() as forward:
            seen, out = count_all_reduces(lambda: block(x))  # noqa: B023
        assert seen == 2 and [c.tag for c in forward] == ["row_forward"] * 2
        with tpk.log_collectives() as backward:
            seen, _ = count_all_reduces(out.sum().backward)
        assert seen == 2 and [c.tag for c in backward] == ["column_backward"] * 2
        assert {(c.op, c.bytes) for c in [*forward, *backward]} == {("all_reduce", 2 * 5 * 18 * 4)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_block_is_two_all_reduces_forward_and_two_backward(pool, ranks):
    pool.run(ranks, a_block_communicates_four_times)
