"""Every layer on n ranks equals the layer on one rank: outputs and gradients."""

import pytest
import torch
from one_rank import WHOLE, assert_near, assert_same_run, group_of_one, sharded_and_whole
from pool import run_on_ranks
from torch.testing import assert_close

import tpkernels as tpk


@pytest.mark.parametrize("name", WHOLE)
@run_on_ranks(1, 2, 3, 4)
def test_equal_to_one_rank(name):
    alone = group_of_one()
    sharded, whole = sharded_and_whole(name, alone)
    assert_same_run(sharded, whole, torch.randn(2, 35, 18))
    whole.zero_grad()
    sharded.zero_grad()
    whole.eval()
    sharded.eval()
    assert_same_run(sharded, whole, torch.randn(1, 3, 18))


@pytest.mark.parametrize("name", ["column", "row in 3 chunks", "mlp gelu"])
@run_on_ranks(1, 3)
def test_inputs_of_any_shape(name):
    alone = group_of_one()
    sharded, whole = sharded_and_whole(name, alone)
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
        sharded.zero_grad()
        whole.zero_grad()
        mine, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
        out, want = sharded(mine), whole(theirs)
        assert_near(out, want)
        out.sum().backward()  # a gradient that is not contiguous either
        want.sum().backward()
        assert_near(mine.grad, theirs.grad)
        for ours, grad in zip(
            tpk.unsharded_gradients(sharded).values(),
            (p.grad for p in whole.parameters()),
            strict=True,
        ):
            assert_close(ours, grad, atol=1e-4, rtol=1e-4)
