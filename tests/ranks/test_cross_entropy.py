"""The vocabulary-parallel cross entropy against torch."""

import itertools

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import run_on_ranks
from refusal import assert_refused
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.sharding.spec import ShardSpec, chunk_sizes

REDUCTIONS = ("mean", "sum", "none")


def whole_logits(tokens, classes, dtype=torch.float32, scale=3.0):
    return (torch.randn(*tokens, classes) * scale).to(dtype)


def some_targets(tokens, classes):
    """Every class by and by, one in five ignored."""
    target = torch.randint(classes, tokens)
    target.view(-1)[: classes - 1] = torch.arange(1, classes)[: target.numel()]
    return target.masked_fill(torch.rand(tokens) < 0.2, -100)


def split_run(logits, target, dloss=None, **options):
    """Return the loss and the gradient of all logits, gathered by hand.

    Backward must start no collective, and forward few and small ones.
    """
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    spec = ShardSpec.chunks(logits.shape[-1], world, dim=-1)
    mine = spec.shard(logits, rank).clone().requires_grad_()
    with tpk.log_collectives() as forward:
        loss = tpf.vocab_parallel_cross_entropy(
            mine, target, group=group, num_classes=logits.shape[-1], **options
        )
    with tpk.log_collectives() as backward:
        loss.backward(torch.ones_like(loss) if dloss is None else dloss)
    assert not backward
    assert {c.op for c in forward} <= {"all_reduce"} and len(forward) <= 3
    size = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # A few numbers a token, not its logits.
    assert sum(c.bytes for c in forward) <= (4 * target.numel() + 2) * size.itemsize
    assert loss.dtype == size and mine.grad.dtype == logits.dtype
    padded = torch.zeros(*mine.shape[:-1], spec.padded_shard_size, dtype=mine.dtype)
    padded[..., : mine.shape[-1]] = mine.grad
    shards = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shards, padded)
    return loss.detach(), spec.unshard(shards)


def stock_run(logits, target, dloss=None, reduction="mean", **options):
    stock = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(
        stock.reshape(-1, stock.shape[-1]), target.reshape(-1), reduction=reduction, **options
    )
    loss = loss.view(target.shape) if reduction == "none" else loss
    loss.backward(torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype))
    return loss.detach(), stock.grad


def assert_as_accurate_as_torch(logits, target, dloss=None, **options):
    """Require max|ours - truth| < 2 max|torch in the same dtype - truth| + 1e-6.

    The truth is torch's result in float32 for half precision, in float64 for float32.
    """
    exact = stock_run(
        logits.to(torch.float64 if logits.dtype == torch.float32 else torch.float32),
        target,
        dloss,
        **options,
    )
    if logits.dtype != torch.float32:
        assert_close(
            reference.vocab_cross_entropy(logits.chunk(3, -1), target, **options), exact[0]
        )
    ours, torchs = (
        split_run(logits, target, dloss, **options),
        stock_run(logits, target, dloss, **options),
    )
    for name, a, b, want in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        error, bound = (
            (a - want).abs().max(),
            2 * (b - want).abs().max() + 1e-6 * want.abs().max().clamp_min(1),
        )
        assert error < bound, (
            f"{name} of {logits.dtype} {tuple(logits.shape)} {options}: "
            f"{error:.2e}, torch's {bound:.2e}"
        )


@pytest.mark.parametrize(
    "classes, dtype",
    list(itertools.product((331, 5), (torch.float32, torch.bfloat16, torch.float16))),
)
@run_on_ranks(1, 2, 3, 4)
def test_as_accurate_as_torch(classes, dtype):
    for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
        tokens = (4, 9) if reduction == "none" else (37,)
        logits, target = whole_logits(tokens, classes, dtype), some_targets(tokens, classes)
        dloss = torch.rand(tokens) if reduction == "none" else torch.tensor(0.7)
        assert_as_accurate_as_torch(
            logits, target, dloss, reduction=reduction, label_smoothing=smoothing
        )
    target = some_targets((37,), classes).masked_fill_(torch.arange(37) == 3, 2)
    assert_as_accurate_as_torch(
        whole_logits((37,), classes, dtype), target.clamp_min(0), ignore_index=2
    )
    assert_as_accurate_as_torch(whole_logits((), classes, dtype), torch.tensor(classes - 1))


@pytest.mark.parametrize("classes, smoothing", list(itertools.product((331, 5), (0.0, 0.1))))
@run_on_ranks(1, 2, 4)
def test_extreme_logits_and_nothing_to_count(classes, smoothing):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_as_accurate_as_torch(
            whole_logits((37,), classes, dtype, 1e4),
            some_targets((37,), classes),
            label_smoothing=smoothing,
        )
    same = dict(equal_nan=True, atol=1e-6, rtol=1e-6)
    logits, target = whole_logits((37,), classes), some_targets((37,), classes).clamp_min(0)
    masked = torch.rand(logits.shape) < 0.4
    masked[:, -1] = True
    masked[:9, :-2] = True  # all classes of some ranks
    masked.scatter_(1, target[:, None], False)
    masked[5], masked[6, target[6]] = True, True  # nothing left; the target itself
    logits.masked_fill_(masked, -torch.inf)
    for reduction in REDUCTIONS:
        options = dict(reduction=reduction, label_smoothing=smoothing)
        assert_close(
            split_run(logits, target, **options), stock_run(logits, target, **options), **same
        )
        fine = target.masked_fill((torch.arange(37) == 5) | (torch.arange(37) == 6), -100)
        loss, grad = stock_run(logits, fine, **options)
        grad[5:7] = 0  # torch's own is NaN for an ignored row of nothing but -inf
        assert_close(split_run(logits, fine, **options), (loss, grad), **same)
        for tokens in ((6,), (0,), (2, 0)):  # all ignored, none there
            logits_, ignored = whole_logits(tokens, classes), torch.full(tokens, -100)
            loss, _ = split_run(logits_, ignored, **options)
            assert_close(loss, stock_run(logits_, ignored, **options)[0], **same)


@run_on_ranks(2, 4)
def test_layouts_and_bit_equal_ranks():
    logits, target = whole_logits((4, 9), 332, torch.float64), some_targets((4, 9), 332)
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert_close(split_run(logits, target)[0], want)
    view = logits.transpose(0, 1)  # not contiguous, as is its shard
    assert_close(split_run(view, target.t())[0], want)
    shard = ShardSpec.chunks(332, world, dim=-1).shard(logits, rank)
    # An even split needs no num_classes.
    assert_close(tpf.vocab_parallel_cross_entropy(shard, target, group=group), want)
    loss = tpf.vocab_parallel_cross_entropy(shard, target, group=group, num_classes=332)
    losses = [torch.empty_like(loss) for _ in range(world)]
    dist.all_gather(losses, loss)
    assert all(torch.equal(loss, other) for other in losses)


@run_on_ranks(3)
def test_refused_on_every_rank_before_communication():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    width = chunk_sizes(331, world)[rank]
    logits, target = torch.zeros(4, width), torch.zeros(4, dtype=torch.long)

    def loss(logits=logits, target=target, **options):
        return lambda: tpf.vocab_parallel_cross_entropy(
            logits, target, **{"group": group, "num_classes": 331, **options}
        )

    assert_refused(loss(target=target + 331), IndexError, "target", "331 to 331", "0 to 330")
    assert_refused(loss(target=target - 1), IndexError, "target", "-1", "0 to 330")
    assert_refused(loss(target=target.float()), TypeError, "target", "torch.float32")
    assert_refused(loss(target=target.short()), TypeError, "target", "torch.int16")
    assert_refused(loss(target=target[:3]), ValueError, "target", "(3,)", "(4,)")
    assert_refused(loss(reduction="avg"), ValueError, "reduction", "'avg'")
    assert_refused(loss(label_smoothing=1.5), ValueError, "label_smoothing", "1.5")
    assert_refused(loss(label_smoothing=float("nan")), ValueError, "label_smoothing", "nan")
    assert_refused(loss(logits=logits.long()), TypeError, "logits_shard", "torch.int64")
    assert_refused(loss(num_classes=500), ValueError, "logits_shard", "500")


@pytest.mark.parametrize("classes,target", [(331, 0), (331, 330), (5, 0), (5, 4)])
@run_on_ranks(4)
def test_uneven_shards_without_num_classes(classes, target):
    """Also for a target that only the wider shards' ranks would take for one in range."""
    shard = torch.zeros(2, chunk_sizes(classes, dist.get_world_size())[dist.get_rank()])
    with pytest.raises(ValueError, match="num_classes"):
        tpf.vocab_parallel_cross_entropy(shard, torch.tensor([0, target]), group=dist.group.WORLD)
