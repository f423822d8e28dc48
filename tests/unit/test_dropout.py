"""Dropout by seed and position, as a function and as a module."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tpkernels.functional as tpf
from tpkernels.nn import Dropout


def test_dropout_of_a_part_is_a_part_of_the_wholes():
    x = torch.rand(12, 31) + 1
    for p, seed in itertools.product((0.3, 0.9), (torch.tensor([5]), torch.tensor([2**62 + 3]))):
        whole = tpf.dropout(x, p, seed)
        kept = whole != 0
        assert_close(whole[kept], x[kept] / (1 - p))
        assert abs(kept.float().mean() - (1 - p)) < 0.1
        for rows, columns in itertools.product(
            ((0, 12), (5, 12), (3, 4)), ((0, 31), (13, 31), (8, 12), (30, 31))
        ):
            part = x[slice(*rows), slice(*columns)]
            assert torch.equal(
                tpf.dropout(part, p, seed, row=rows[0], column=columns[0]),
                whole[slice(*rows), slice(*columns)],
            )
        assert torch.equal(tpf.dropout(x.view(3, 4, 31), p, seed), whole.view(3, 4, 31))
        assert not torch.equal(tpf.dropout(x, p, seed + 1) != 0, kept)


@pytest.mark.parametrize("row,column", [(0, 0), (5, 3)])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_the_gradient_of_dropout_has_its_mask(p, row, column):
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.rand(6, 10) + 1).to(dtype).requires_grad_()
        y = tpf.dropout(x, p, torch.tensor([1]), row=row, column=column)
        dy = torch.rand(6, 10).to(dtype) + 1
        y.backward(dy)
        kept = y != 0
        assert kept.all() if p == 0 else not kept.any() if p == 1 else 0 < kept.sum() < 60
        assert torch.equal(x.grad != 0, kept) and y.dtype == x.grad.dtype == dtype
        for ours, source in ((y, x), (x.grad, dy)):
            want = torch.where(kept, source.float() / (1 - p) if p < 1 else 0, 0).to(dtype)
            assert_close(ours, want)


def test_dropout_without_a_seed_draws_one_and_moves_on():
    x = torch.ones(40, 5)
    torch.manual_seed(3)
    a, b = tpf.dropout(x), tpf.dropout(x)
    torch.manual_seed(3)
    assert (
        torch.equal(tpf.dropout(x), a) and torch.equal(tpf.dropout(x), b) and not torch.equal(a, b)
    )
    layer = Dropout(0.5)
    torch.manual_seed(3)
    assert torch.equal(layer(x), a)
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x


def test_dropout_is_recomputed_by_checkpointing():
    x = torch.randn(40, 5, requires_grad=True)
    torch.manual_seed(3)
    y = checkpoint(
        lambda x: tpf.dropout(x * 1.0).square(), x, use_reentrant=False, preserve_rng_state=True
    )
    y.sum().backward()
    assert 0 < (y == 0).sum() < 200
    assert_close(x.grad, torch.where(y != 0, 8 * x, 0))  # y = (2 x)^2
