"""Dropout in a sharded region: ranks draw masks of their own and stay in step."""

from types import SimpleNamespace

import families
import pytest
import torch
import torch.distributed as dist
from helpers import everyone
from pool import run_on_ranks
from torch import nn

import tpkernels as tpk


class Dropping(nn.Module):
    """Attention with dropout on its weights, between replicated dropouts.

    Of 2 ranks one has 6 heads and one has 3: they draw unequally.
    """

    def __init__(self, group):
        super().__init__()
        self.before, self.after = nn.Linear(72, 72), nn.Linear(72, 72)
        self.drop = nn.Dropout(0.2)
        self.attention = tpk.nn.ParallelSelfAttention(72, 9, 3, dropout=0.3, group=group)

    def forward(self, x):
        x = self.drop(self.before(x))
        return self.after(self.drop(self.attention(x)))


def dropout_keeps_ranks_in_step(checkpointing):
    torch.manual_seed(0)
    model = Dropping(dist.group.WORLD).train()
    x = torch.randn(2, 16, 72, requires_grad=True)
    for _ in range(3):
        if checkpointing:
            y = torch.utils.checkpoint.checkpoint(
                model, x, use_reentrant=checkpointing == "reentrant"
            )
        else:
            y = model(x)
        y.square().mean().backward()
        a, b = everyone(torch.rand(4))  # the ranks' default generators
        assert torch.equal(a, b)
    for layer in (model.before, model.after):
        for parameter in layer.parameters():
            a, b = everyone(parameter.grad)
            assert torch.equal(a, b)
    # A mask is drawn anew each time, and each rank draws its own.
    rng = model.attention.region.rng
    draws = []
    for _ in range(20):
        rng.fork(x.device)
        draws.append(torch.rand(()).item())
        rng.restore()
    others = set(everyone(torch.tensor(draws))[1 - dist.get_rank()].tolist())
    assert len(set(draws)) == len(draws) and not set(draws) & others
    return y.detach(), model.before.weight.grad


class Drawing(nn.Module):
    """A user's module that draws a number between a column and a row layer."""

    def __init__(self, **attributes):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        x = self.up(x)
        self.drawn = torch.rand(8)
        return self.down(x)


@pytest.mark.parametrize(
    "attributes, training, apart",
    [
        (dict(config=SimpleNamespace(attention_dropout=0.2, width=3.0)), True, True),
        (dict(config=SimpleNamespace(attention_dropout=0.0, width=3.0)), True, False),
        (dict(config=SimpleNamespace(attention_dropout=0.2)), False, False),
        (dict(drop_rate=0.2), True, True),
        (dict(drop_rate=0.0, scale=0.2), True, False),
        (dict(layer=nn.Dropout(0.2)), True, True),
        (dict(layer=nn.Dropout2d(0.2)), True, True),
        (dict(layer=nn.Dropout(0.0)), True, False),
        (dict(layer=nn.Dropout(0.2)), False, False),
    ],
    ids=str,
)
@run_on_ranks(2)
def test_ranks_draw_apart_in_a_region_that_drops(attributes, training, apart):
    model = Drawing(**attributes).train(training)
    tpk.parallelize(model, dist.group.WORLD, {"up": "colwise", "down": "rowwise"})
    model(torch.randn(2, 8))
    a, b = everyone(model.drawn)
    assert torch.equal(a, b) != apart
    a, b = everyone(torch.rand(4))
    assert torch.equal(a, b)


def test_dropout_in_a_split_region(pool):
    plain, _ = pool.run(2, dropout_keeps_ranks_in_step, None)
    for how in ("reentrant", "non-reentrant"):  # recomputing draws the same masks
        again, _ = pool.run(2, dropout_keeps_ranks_in_step, how)
        assert torch.equal(plain[0], again[0]) and torch.allclose(
            plain[1], again[1], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", dict(attention_dropout=0.2)),
        ("gpt2", dict(attn_pdrop=0.2, resid_pdrop=0.1, embd_pdrop=0.1)),
    ],
)
@run_on_ranks(2)
def test_dropout_of_hugging_face_models(family, changes):
    model = tpk.parallelize(
        families.make(family, **changes), dist.group.WORLD, dtensor=False
    ).train()
    ids, labels = families.batch()
    losses = []
    for _ in range(2):
        loss = model(ids, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    a, b = everyone(torch.stack(losses))
    assert torch.equal(a, b) and losses[0] != losses[1]
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            a, b = everyone(parameter.grad)
            assert torch.equal(a, b), name
    a, b = everyone(torch.rand(4))
    assert torch.equal(a, b)
