"""Column layers of one input share one all-reduce of its gradient, and stay right where they cannot."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads
from pool import run_on_ranks
from torch import nn
from user_models import PLAN, Attention, Lora, llama_pair

import tpkernels as tpk


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "checkpointing non-reentrant",
        "checkpointing reentrant",
        "two graphs",
        "two graphs backward in turn",
        "retain_graph",
        "frozen weights",
        "frozen input",
        "deepcopy",
    ],
)
@run_on_ranks(2)
def test_a_fused_column_group_shares_one_all_reduce(case):
    """One training step of a split Llama under `case` against the same step of the unsplit one."""
    stock, model = llama_pair(attention_dropout=0.0)
    ids, labels = families.batch()
    more, _ = families.batch(seed=8)

    def each(f):
        f(stock), f(model)

    if case.startswith("checkpointing"):
        each(
            lambda m: (
                m.train(),
                m.gradient_checkpointing_enable(dict(use_reentrant=case.endswith("reentrant"))),
            )
        )
        if case.endswith(" reentrant"):
            each(lambda m: m.enable_input_require_grads())
    if case == "frozen weights":
        each(
            lambda m: [
                p.requires_grad_("up_proj" in n or "embed" in n) for n, p in m.named_parameters()
            ]
        )
    if case == "frozen input":
        each(
            lambda m: [
                p.requires_grad_("layers.1" in n and "proj" in n) for n, p in m.named_parameters()
            ]
        )
    if case == "deepcopy":
        model = copy.deepcopy(model)

    def step(m):
        loss = m(ids, labels=labels).loss
        if case == "two graphs":
            loss = loss + m(more, labels=more).loss
        if case == "two graphs backward in turn":
            other = m(more, labels=more).loss
            loss.backward()
            other.backward()
            return
        if case == "retain_graph":
            loss.backward(retain_graph=True)
        loss.backward()

    with tpk.log_collectives() as log:
        step(model)
    step(stock)
    assert_same_grads(stock, model)
    blocks = 2
    wanted = {
        "two graphs": 4,
        "two graphs backward in turn": 4,
        "retain_graph": 4,
        "frozen input": None,
    }.get(case, 2)
    backward = sum(c.tag == "column_backward" for c in log)
    # Nothing before layer 1 needs a gradient: its attention's input does not, its MLP's does.
    assert backward == (wanted * blocks if wanted else 1)
    for module in model.modules():
        if getattr(module, "region", None) is not None:
            assert (
                module.region.input is None and not module.region.outputs
            )  # nothing is kept alive


@pytest.mark.parametrize(
    "case, wanted",
    [
        ("one input", 1),
        ("cross-attention", 3),
        ("skipped sibling", 1),
        ("wrapped sibling", 2),
        ("hooked sibling", 4),
    ],
)
@run_on_ranks(2)
def test_siblings_that_do_not_share_stay_right(case, wanted):
    torch.manual_seed(0)
    stock = Attention(skip=case == "skipped sibling")
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, PLAN, dtensor=False)
    generator = torch.Generator().manual_seed(1)
    x, memory = (
        torch.randn(2, 5, 72, generator=generator),
        torch.randn(2, 7, 72, generator=generator),
    )
    inputs = [x, memory] if case == "cross-attention" else [x]
    if case == "wrapped sibling":
        first = sum(model.wk.out_spec.shard_sizes[: dist.get_rank()])
        stock.wk = Lora(stock.wk, 72, 3)
        wrapped = Lora(model.wk, 72, 3)
        wrapped.up = nn.Parameter(
            wrapped.up[first : first + model.wk.out_spec.shard_sizes[dist.get_rank()]],
            requires_grad=False,
        )
        model.wk = wrapped
    if case == "hooked sibling":
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
    if case != "wrapped sibling":
        assert_same_grads(stock, model, 1e-4)
