"""The transformer block: written out in plain torch, and its collectives."""

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXACT, count_all_reduces
from one_rank import assert_near, assert_same_grads
from pool import run_on_ranks
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import ParallelTransformerBlock


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


@pytest.mark.parametrize(
    "kv_heads, norm, activation",
    [(9, "layernorm", "gelu"), (3, "rmsnorm", "swiglu"), (1, "rmsnorm", "relu2")],
)
@run_on_ranks(2)
def test_a_block_written_out_in_plain_torch(kv_heads, norm, activation):
    x = torch.randn(2, 7, 18)
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


@pytest.mark.parametrize("kv_heads, norm", [(9, "layernorm"), (3, "rmsnorm")])
@run_on_ranks(2, 3)
def test_a_block_is_two_all_reduces_forward_and_two_backward(kv_heads, norm):
    # the KV projections stay divided on 2 and 3 ranks
    block = ParallelTransformerBlock(18, 9, 27, kv_heads, norm=norm, group=dist.group.WORLD)
    x = torch.randn(2, 5, 18, requires_grad=True)
    with tpk.log_collectives() as forward:
        seen, out = count_all_reduces(lambda: block(x))
    assert seen == 2 and [c.tag for c in forward] == ["row_forward"] * 2
    with tpk.log_collectives() as backward:
        seen, _ = count_all_reduces(out.sum().backward)
    assert seen == 2 and [c.tag for c in backward] == ["column_backward"] * 2
    assert {(c.op, c.bytes) for c in [*forward, *backward]} == {("all_reduce", 2 * 5 * 18 * 4)}


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@run_on_ranks(1, 2)
def test_a_block_without_gradients(norm):
    block = ParallelTransformerBlock(
        18, 9, 27, 3, norm=norm, activation="swiglu", group=dist.group.WORLD
    )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(18))
    x = torch.randn(2, 5, 18)
    out = block(x, rotary=tpf.rotary_tables(5, 2))
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        again = block(x, rotary=tpf.rotary_tables(5, 2))
    assert_close(again, out.detach(), **EXACT)
    ops = {event.key for event in profile.key_averages()}
    assert ("tpkernels::row_linear_rms_norm" in ops) == (norm == "rmsnorm")
