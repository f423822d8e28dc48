"""Column- and row-parallel layers: initialisation, conversion, explain(), work that is not done."""

from functools import partial

import pytest
import reference
import torch
import torch.distributed as dist
from helpers import EXACT
from one_rank import assert_near, seeded
from pool import run_on_ranks
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import tpkernels as tpk
from tpkernels import _C
from tpkernels.nn import ColumnParallelLinear, ParallelMLP, RowParallelLinear
from tpkernels.ops import column_linear, linear, row_linear


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("shape", [(18, 23), (5, 3)], ids=str)
@run_on_ranks(1, 4)
def test_a_seed_gives_nn_linears_weights(shape, kind):
    group = dist.group.WORLD
    stock = seeded(partial(nn.Linear, *shape))
    for layer in (
        seeded(partial(kind, *shape), group=group),
        kind.from_linear(stock, group=group),
    ):
        assert_close(dict(tpk.unsharded_state_dict(layer)), dict(stock.state_dict()), **EXACT)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@run_on_ranks(3)
def test_from_linear(kind):
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 23)
    stock.weight.requires_grad_(False)
    stock.eval()
    before = stock.weight.clone()
    layer = kind.from_linear(stock, group=group)
    assert not layer.training and not layer.weight.requires_grad and layer.bias.requires_grad
    # The shard does not keep the whole weight alive.
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
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


@pytest.mark.parametrize(
    "overlap, reason", [("auto", "CPU"), (False, "overlap=False"), (3, "overlap=3 was asked for")]
)
@run_on_ranks(1, 2)
def test_explain_says_the_chunks_and_why(overlap, reason):
    group, ranks = dist.group.WORLD, dist.get_world_size()
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


class Recorder:
    """Stands for torch.ops.tpkernels in tpkernels.ops: notes the arguments and results of ops."""

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


@run_on_ranks(2)
def test_auto_on_cpus_is_the_path_of_one_chunk():
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


def gemms_and_collectives(run):
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        tpk.log_collectives() as log,
    ):
        run()
    return sum(
        e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")
    ), len(log)


@pytest.mark.parametrize(
    "frozen", [(), ("input",), ("weight",), ("weight", "bias"), ("input", "weight")], ids=str
)
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@run_on_ranks(2)
def test_what_needs_no_gradient_is_neither_computed_nor_sent(kind, frozen):
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 24)
    layer = kind.from_linear(stock, group=group)
    x = torch.randn(6, 18)
    x = x if kind is ColumnParallelLinear else layer.input_spec.shard(x, rank).clone()
    x.requires_grad_("input" not in frozen)
    layer.weight.requires_grad_("weight" not in frozen)
    layer.bias.requires_grad_("bias" not in frozen)
    out = layer(x)
    with Recorder() as recorder:
        gemms, collectives = gemms_and_collectives(lambda: out.backward(torch.ones_like(out)))
    wanted = {"input": x, "weight": layer.weight, "bias": layer.bias}
    assert {name for name, t in wanted.items() if t.grad is None} == set(frozen)
    assert gemms == 2 - ("input" in frozen) - ("weight" in frozen)
    assert collectives == (kind is ColumnParallelLinear and "input" not in frozen)
    assert all(len(result) == 3 - len(frozen) for _, _, result in recorder.calls)
    layer = ColumnParallelLinear.from_linear(stock, group=group)
    with torch.no_grad(), tpk.log_collectives() as log:
        assert not layer(torch.randn(6, 18)).requires_grad
    assert not log
