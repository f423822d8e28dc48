"""Attention over ranks: masks and rotary embedding."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import turned
from one_rank import assert_same_run, group_of_one, sharded_and_whole
from pool import run_on_ranks
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import ParallelSelfAttention


@pytest.mark.parametrize("name", ["attention 9", "attention 9/3", "attention 9/1", "block rmsnorm"])
@run_on_ranks(4)
def test_attention_masks(name):
    alone = group_of_one()
    sharded, whole = sharded_and_whole(name, alone)
    x = torch.randn(2, 5, 18)
    keep = torch.rand(2, 1, 5, 5) < 0.7
    keep |= torch.eye(5, dtype=torch.bool)
    for mask in (keep, torch.randn(5, 5)):
        assert_same_run(sharded, whole, x, mask)
    with torch.no_grad():  # a mask takes the place of the causal one
        everything = sharded(x, torch.ones(5, 5, dtype=torch.bool))
        assert (everything - sharded(x)).abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [9, 3, 1])
@run_on_ranks(1, 2, 3, 4)
def test_attention_with_rotary_embedding(kv_heads):
    group, alone = (
        dist.group.WORLD,
        [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()],
    )
    cos, sin = tpf.rotary_tables(7, 4)
    layers = []
    for g in (group, alone):
        torch.manual_seed(1)
        layers.append(ParallelSelfAttention(18, 9, kv_heads, head_dim=4, group=g))
    sharded, whole = layers
    x, dy = torch.randn(2, 7, 18), torch.randn(2, 7, 18)
    leaves = [x.clone().requires_grad_() for _ in layers]
    outs = [layer(leaf, rotary=(cos, sin)) for layer, leaf in zip(layers, leaves, strict=True)]
    for out in outs:
        out.backward(dy)
    near = dict(atol=2e-5, rtol=2e-5)
    assert_close(*outs, **near)
    assert_close(*(leaf.grad for leaf in leaves), **near)
    assert_close(
        dict(tpk.unsharded_gradients(sharded)),
        {name: p.grad for name, p in whole.named_parameters()},
        atol=1e-4,
        rtol=1e-4,
    )
    p = {name: t.detach() for name, t in whole.state_dict().items()}
    q, k, v = (
        F.linear(x, p[f"{n}_proj.weight"], p[f"{n}_proj.bias"])
        .unflatten(-1, (-1, 4))
        .transpose(1, 2)
        for n in "qkv"
    )
    q, k = (turned(t, cos, sin, False).float() for t in (q, k))
    y = (
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        .transpose(1, 2)
        .flatten(2)
    )
    assert_close(outs[0].detach(), F.linear(y, p["o_proj.weight"], p["o_proj.bias"]), **near)
