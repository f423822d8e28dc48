"""Training: dropout in split regions, autocast, FSDP2 and DDP beside tensor parallelism, fp16's overflow."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tpkernels as tpk
from tpkernels.ops.collective_log import log_collectives


def everyone(tensor):
    """Every rank's copy."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return copies


class Dropping(nn.Module):
    """Attention with dropout on its weights, between replicated dropouts: 6 heads on one rank and 3 on the other draw unequally."""

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
    for _ in range(2):
        rng.fork(x.device)
        draws.append(torch.rand(8))
        rng.restore()
    assert not torch.equal(*draws) and not torch.equal(*everyone(draws[0]))
    return y.detach(), model.before.weight.grad


def test_dropout_in_a_split_region(pool):
    plain, _ = pool.run(2, dropout_keeps_ranks_in_step, None)
    for how in ("reentrant", "non-reentrant"):  # recomputing draws the same masks
        again, _ = pool.run(2, dropout_keeps_ranks_in_step, how)
        assert torch.equal(plain[0], again[0]) and torch.allclose(
            plain[1], again[1], rtol=1e-5, atol=1e-7
        )


def hf_dropout(family, changes):
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


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", dict(attention_dropout=0.2)),
        ("gpt2", dict(attn_pdrop=0.2, resid_pdrop=0.1, embd_pdrop=0.1)),
    ],
)
def test_dropout_of_hugging_face_models(pool, family, changes):
    pool.run(2, hf_dropout, family, changes)


def autocast(dtensor):
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


def autocast_details():
    group = dist.group.WORLD
    torch.manual_seed(0)
    layer = tpk.nn.ColumnParallelLinear(16, 12, group=group)
    row = tpk.nn.RowParallelLinear(12, 16, group=group)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = row(layer(x))
        assert (
            y.dtype == torch.bfloat16 and row(layer(x), residual=x).dtype == torch.float32
        )  # as y + x promotes
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


@pytest.mark.parametrize("dtensor", [True, False])
def test_bf16_autocast(pool, dtensor):
    pool.run(2, autocast, dtensor)


def test_autocast_casts_once_and_checks_after(pool):
    pool.run(2, autocast_details)


def tp_and_dp(how, changes):
    mesh = tpk.init_mesh(tp=2, dp=2, device="cpu")
    stock = families.make("llama", **changes)
    model = tpk.parallelize(copy.deepcopy(stock), mesh["tp"], dtensor=how == "fsdp")
    trained = model
    if how == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    else:
        trained = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    ids, _ = families.batch(size=4)
    mine = ids.chunk(2)[mesh["dp"].get_local_rank()]
    kind = dict(fused=True) if how == "fsdp" else dict(foreach=True)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3, **kind) for m in (model, stock)]
    for step in range(3):
        loss, want = trained(mine, labels=mine).loss, stock(ids, labels=ids).loss
        loss.backward()
        want.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=mesh["dp"].get_group())
        assert abs(mean / 2 - want) < 2e-5 * want
        if step == 0:
            assert_same_grads(stock, model)
        want_norm = nn.utils.clip_grad_norm_(stock.parameters(), 0.1)
        if how == "fsdp" and step == 1:  # torch's own is right on DTensors
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1).full_tensor()
        else:
            norm = tpk.clip_grad_norm_(model.parameters(), 0.1)
        assert not isinstance(norm, DTensor) and abs(norm - want_norm) < 1e-4 * want_norm
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = tpk.unsharded_state_dict(model)
    want = stock.state_dict()
    assert list(state) == list(want)
    worst = max(((state[k] - want[k]).abs().max() / want[k].abs().max()).item() for k in want)
    assert worst < 1e-3
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    tpk.load_unsharded_state_dict(model, state)
    assert all(torch.equal(v, state[k]) for k, v in tpk.unsharded_state_dict(model).items())


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=160, vocab_size=332)],
)
def test_tp_inside_dp(pool, how, changes):
    pool.run(4, tp_and_dp, how, changes)


def norms(kind):
    stock = families.make("llama")
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=False)
    ids, labels = families.batch()
    for m in (model, stock):
        m(ids, labels=labels).loss.backward()
    norm = tpk.clip_grad_norm_(model.parameters(), 0.1, norm_type=kind)
    want = nn.utils.clip_grad_norm_(stock.parameters(), 0.1, norm_type=kind)
    assert abs(norm - want) < 1e-5 * want
    assert_same_grads(stock, model)  # clipped
    twin = copy.deepcopy(model)  # its modules are known too
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    assert (
        abs(
            tpk.clip_grad_norm_(twin.parameters(), 1e9, norm_type=kind)
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


@pytest.mark.parametrize("kind", [2.0, 1.0, float("inf")])
def test_the_norm_of_plain_parameters(pool, kind):
    pool.run(2, norms, kind)
    pool.run(4, norms, kind)


def scaler(dtensor):
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


@pytest.mark.parametrize("dtensor", [True, False])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool, dtensor):
    pool.run(2, scaler, dtensor)
