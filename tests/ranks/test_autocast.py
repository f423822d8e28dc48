"""Layers and models under autocast."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels as tpk
from tpkernels.ops.collective_log import log_collectives


@pytest.mark.parametrize("dtensor", [True, False])
@run_on_ranks(2)
def test_bf16_autocast(dtensor):
    stock = families.make("llama")
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)
    ids, labels = families.batch()
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, stock)]
    losses = []
    for _ in range(3):
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = m(ids, labels=labels).loss
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in m.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    ours, want = losses[::2], losses[1::2]
    assert ours[-1] < ours[0]
    assert all(abs(a - b) < 2e-2 * b for a, b in zip(ours, want, strict=True)), (ours, want)


@run_on_ranks(2)
def test_autocast_casts_once_and_checks_after():
    group = dist.group.WORLD
    torch.manual_seed(0)
    layer = tpk.nn.ColumnParallelLinear(16, 12, group=group)
    row = tpk.nn.RowParallelLinear(12, 16, group=group)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = row(layer(x))
        # The result has the type that y + x promotes to.
        assert y.dtype == torch.bfloat16 and row(layer(x), residual=x).dtype == torch.float32
        first, second = layer.weight_and_bias()[0], layer.weight_and_bias()[0]
        assert first is second or first.data_ptr() == second.data_ptr()  # cast once
        with log_collectives() as log:
            y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert not log  # x needs no gradient
    with pytest.raises(TypeError, match=r"weight is torch\.float32 but input is torch\.bfloat16"):
        layer(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # checked after the cast
        layer(x.bfloat16())
