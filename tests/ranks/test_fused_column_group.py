"""Column layers of one input share one all-reduce of its gradient, and are right without it."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads, everyone
from pool import run_on_ranks
from torch import nn
from user_models import PLAN, Attention, Lora, llama_pair

import tpkernels as tpk


def prepare(model, case):
    """Set up a model as `case` says."""
    if case.startswith("checkpointing"):
        model.train()
        reentrant = case == "checkpointing reentrant"
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        if reentrant:
            model.enable_input_require_grads()
    trained = {
        "frozen weights": lambda name: "up_proj" in name or "embed" in name,
        "frozen input": lambda name: "layers.1" in name and "proj" in name,
    }.get(case)
    if trained:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained(name))


def step(model, case):
    ids, labels = families.batch()
    more, _ = families.batch(seed=8)
    loss = model(ids, labels=labels).loss
    if case == "two graphs":
        loss = loss + model(more, labels=more).loss
    if case == "two graphs backward in turn":
        other = model(more, labels=more).loss
        loss.backward()
        other.backward()
        return
    if case == "retain_graph":
        loss.backward(retain_graph=True)
    loss.backward()


# The all-reduces of a block's column layers in each case.
COLUMN_BACKWARD = {
    "plain": 2,
    "checkpointing non-reentrant": 2,
    "checkpointing reentrant": 2,
    "two graphs": 4,
    "two graphs backward in turn": 4,
    "retain_graph": 4,
    "frozen weights": 2,
    "frozen input": 0.5,
    "deepcopy": 2,
}


@pytest.mark.parametrize("case", COLUMN_BACKWARD)
@run_on_ranks(2)
def test_a_fused_column_group_shares_one_all_reduce(case):
    """A training step of a sharded Llama equals the step of the unsharded one."""
    stock, model = llama_pair(attention_dropout=0.0)
    for m in (stock, model):
        prepare(m, case)
    if case == "deepcopy":
        model = copy.deepcopy(model)
    with tpk.log_collectives() as log:
        step(model, case)
    step(stock, case)
    assert_same_grads(stock, model)
    # Nothing before layer 1 of 2 needs a gradient where its input is frozen: its attention's input
    # does not, its MLP's does.
    backward = sum(c.tag == "column_backward" for c in log)
    assert backward == COLUMN_BACKWARD[case] * 2
    for module in model.modules():
        if getattr(module, "region", None) is not None:
            # Nothing is kept alive.
            fused = module.region.fused_columns
            assert fused.input is None and not fused.outputs


@pytest.mark.parametrize(
    "case, wanted",
    [
        ("one input", 1),
        ("cross-attention", 3),
        ("skipped layer", 1),
        ("wrapped layer", 2),
        ("hooked layer", 4),
    ],
)
@run_on_ranks(2)
def test_layers_that_leave_the_group_stay_right(case, wanted):
    torch.manual_seed(0)
    stock = Attention(skip=case == "skipped layer")
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, PLAN, dtensor=False)
    generator = torch.Generator().manual_seed(1)
    x, memory = (
        torch.randn(2, 5, 72, generator=generator),
        torch.randn(2, 7, 72, generator=generator),
    )
    inputs = [x, memory] if case == "cross-attention" else [x]
    if case == "wrapped layer":
        first = sum(model.wk.out_spec.shard_sizes[: dist.get_rank()])
        stock.wk = Lora(stock.wk, 72, 3)
        wrapped = Lora(model.wk, 72, 3)
        wrapped.up = nn.Parameter(
            wrapped.up[first : first + model.wk.out_spec.shard_sizes[dist.get_rank()]],
            requires_grad=False,
        )
        model.wk = wrapped
    if case == "hooked layer":
        model.wv.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    mine, theirs = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    with tpk.log_collectives() as log:
        y = model(*mine)
        y.square().sum().backward()
    want = stock(*theirs)
    want.square().sum().backward()
    assert (y - want).abs().max() < 1e-4 * want.abs().max()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4 * b.grad.abs().max()
    assert sum(c.tag == "column_backward" for c in log) == wanted
    if case != "wrapped layer":
        assert_same_grads(stock, model, 1e-4)


class Failure(Exception):
    pass


def fail(*_):
    raise Failure


@pytest.mark.parametrize("where", ["after the first column layer", "before the row layer"])
@run_on_ranks(2)
def test_an_exception_in_a_region_leaves_nothing_behind(where):
    torch.manual_seed(0)
    group = dist.group.WORLD
    layer, unharmed = (
        tpk.nn.ParallelSelfAttention(72, 9, 1, dropout=0.3, group=group) for _ in range(2)
    )
    unharmed.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1))
    if where == "before the row layer":
        failing = layer.o_proj.register_forward_pre_hook(fail)
    else:
        failing = layer.q_proj.register_forward_hook(fail)
    with pytest.raises(Failure):
        layer(x)
    failing.remove()
    a, b = everyone(torch.rand(4))  # the ranks' default generators are in step
    assert torch.equal(a, b)
    fused = layer.region.fused_columns
    assert fused.input is None and not fused.outputs  # nothing is kept alive
    assert not any(proj.grad_summed for proj in (layer.k_proj, layer.v_proj))
    for run in (lambda module: module.k_proj(x), lambda module: module(x)):
        outs = []
        for module in (layer, unharmed):
            torch.manual_seed(2)
            outs.append(run(module))
            outs[-1].square().sum().backward()
        assert torch.equal(*outs)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, unharmed.get_parameter(name).grad), name
