"""Gradient norms and overflow of sharded parameters."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads
from pool import run_on_ranks
from torch import nn
from torch.distributed.tensor import DTensor

import tpkernels as tpk


@pytest.mark.parametrize("kind", [2.0, 1.0, float("inf")])
@run_on_ranks(2, 4)
def test_the_norm_of_plain_parameters(kind):
    stock = families.make("llama")
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=False)
    ids, labels = families.batch()
    for m in (model, stock):
        m(ids, labels=labels).loss.backward()
    norm = tpk.clip_grad_norm_(model.parameters(), 0.1, norm_type=kind)
    want = nn.utils.clip_grad_norm_(stock.parameters(), 0.1, norm_type=kind)
    assert abs(norm - want) < 1e-5 * want
    assert_same_grads(stock, model)  # clipped
    copied = copy.deepcopy(model)  # its modules are known too
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    assert (
        abs(
            tpk.clip_grad_norm_(copied.parameters(), 1e9, norm_type=kind)
            - nn.utils.get_total_norm([p.grad for p in stock.parameters()], kind)
        )
        < 1e-5
    )
    model.lm_head.weight.grad[0, 0] = torch.inf if dist.get_rank() == 1 else 0
    with pytest.raises(RuntimeError, match=r"is inf|is nan"):
        tpk.clip_grad_norm_(model.parameters(), 0.1, norm_type=kind, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="mix DTensors"):
        mixed = DTensor.from_local(
            torch.zeros(1), dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        )
        tpk.clip_grad_norm_([mixed, torch.zeros(1)], 1.0)


@pytest.mark.parametrize("dtensor", [True, False])
@run_on_ranks(2)
def test_an_overflow_on_one_rank_skips_the_step_on_all(dtensor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    tpk.parallelize(model, dist.group.WORLD, {"0": "colwise", "1": "rowwise"}, dtensor=dtensor)
    before = tpk.unsharded_state_dict(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = tpk.GradScaler("cpu", group=dist.group.WORLD, init_scale=4.0)
    for overflow in (True, False):
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        if overflow and dist.get_rank() == 0:  # on one rank only
            grad = model[1].weight.grad
            (grad.to_local() if dtensor else grad)[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = tpk.unsharded_state_dict(model)
        assert all(torch.equal(after[k], before[k]) for k in before) == overflow
        assert scaler.get_scale() == 2.0
