"""The output layer and its loss in one, a chunk of tokens at a time, against the unsharded ones."""

import itertools

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXACT, assert_as_accurate, truth_dtype
from pool import run_on_ranks
from refusal import assert_refused
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.sharding.spec import ShardSpec, chunk_sizes

IGNORED = -100


def some_targets(rows, classes, ignored=0.2):
    return torch.randint(classes, (rows,)).masked_fill(torch.rand(rows) < ignored, IGNORED)


def sharded_loss(x, w, b, target, classes, dloss=1.0, **options):
    """Return the loss, and the gradients of the input and of the whole weight and bias."""
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    spec = ShardSpec.chunks(classes, world)
    leaf = x.detach().clone().requires_grad_()
    mine = [None if t is None else spec.shard(t, rank).clone().requires_grad_() for t in (w, b)]
    loss = tpf.vocab_parallel_linear_cross_entropy(
        leaf,
        mine[0],
        target,
        mine[1],
        num_classes=classes,
        group=group,
        **{"ignore_index": IGNORED, **options},
    )
    (loss * dloss).backward()
    grads = [leaf.grad]
    for t in mine:
        if t is not None:
            shards = [None] * world
            dist.all_gather_object(shards, t.grad)
            grads.append(torch.cat(shards))
    return [loss.detach(), *grads]


def stock_loss(x, w, b, target, dtype, dloss=1.0, **options):
    """Return what `sharded_loss` does; the input's gradient adds the ranks' partial ones."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
    logits = F.linear(*leaves)
    logits.retain_grad()
    loss = F.cross_entropy(
        logits.flatten(0, -2).to(torch.promote_types(dtype, torch.float32)),
        target.flatten(),
        **{"ignore_index": IGNORED, **options},
    )
    (loss * dloss).backward()
    world = dist.get_world_size()
    shards = [
        [ShardSpec.chunks(len(w), world, dim).shard(t, r) for r in range(world)]
        for t, dim in ((logits.grad, -1), (leaves[1].detach(), 0))
    ]
    dx = reference.column_linear_input_grad(*shards)
    return [loss.detach(), dx, *(t.grad for t in leaves[1:] if t is not None)]


# Not 5 classes in bfloat16: the largest of five roundings says little.
@pytest.mark.parametrize(
    "classes, dtype", [(331, torch.float32), (331, torch.bfloat16), (5, torch.float32)]
)
@run_on_ranks(1, 2, 3, 4)
def test_a_fused_loss_is_the_unsharded_models(classes, dtype):
    # (chunk_rows, smoothing)
    cases = itertools.cycle(itertools.product((1, 7, 64, None), (0.0, 0.1)))
    for reduction, with_bias in itertools.product(("mean", "sum"), (True, False)):
        for _ in range(2 if dtype == torch.float32 else 4):
            chunk_rows, smoothing = next(cases)
            x, w, b = (
                torch.randn(2, 11, 16),
                torch.randn(classes, 16) / 2,
                torch.randn(classes) if with_bias else None,
            )
            x, w, b = (None if t is None else t.to(dtype) for t in (x, w, b))
            target, dloss = some_targets(22, classes).view(2, 11), 0.7
            if dtype != torch.float32:
                # Factors that are powers of two round the gradients no further.
                target = torch.randint(classes, (22,))
                target = target.index_fill(0, torch.randperm(22)[:6], IGNORED).view(2, 11)
                dloss = 0.5
            options = dict(reduction=reduction, label_smoothing=smoothing, dloss=dloss)
            ours = sharded_loss(x, w, b, target, classes, chunk_rows=chunk_rows, **options)
            truth, same_dtype = (
                stock_loss(x, w, b, target, d, **options) for d in (truth_dtype(dtype), dtype)
            )
            assert ours[0].dtype == torch.float32 and all(grad.dtype == dtype for grad in ours[1:])
            for name, *values in zip(
                ("loss", "dx", "dw", "db"), ours, same_dtype, truth, strict=False
            ):
                assert_as_accurate(
                    f"{name} in chunks of {chunk_rows}, {reduction}, smoothing {smoothing}",
                    *values,
                )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [3, 0, -1])
@run_on_ranks(2)
def test_a_fused_loss_ignores_the_index_that_the_caller_names(ignore_index, reduction):
    x, w, b = torch.randn(22, 16), torch.randn(5, 16), torch.randn(5)
    target = torch.randint(5, (22,)).index_fill(0, torch.arange(4), ignore_index)
    options = dict(reduction=reduction, ignore_index=ignore_index, label_smoothing=0.1)
    ours = sharded_loss(x, w, b, target, 5, chunk_rows=7, **options)
    want = stock_loss(x, w, b, target, torch.float32, **options)
    assert_close(ours, want, atol=1e-5, rtol=1e-5)
    assert not ours[1][:4].any()


@run_on_ranks(4)
def test_a_fused_loss_of_no_tokens():
    w, b = torch.randn(5, 16), torch.randn(5)
    for shape, reduction in itertools.product(((0,), (2, 0), (3,)), ("mean", "sum")):
        x, target = torch.randn(*shape, 16), torch.full(shape, IGNORED)
        options = dict(reduction=reduction)
        assert_close(
            sharded_loss(x, w, b, target, 5, chunk_rows=2, **options),
            stock_loss(x, w, b, target, torch.float32, **options),
            equal_nan=True,
        )


class Allocations(TorchDispatchMode):
    """The number of elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.max_shard_size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tpkernels":  # into its kernel, which is made of ops too
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.itemsize
            for t in tree_leaves(result)
            if torch.is_tensor(t)
        ]
        self.max_shard_size = max([self.max_shard_size, *sizes])
        return result


@run_on_ranks(2, 3)
def test_a_fused_loss_holds_a_chunk_and_sends_what_is_needed():
    group, rank, rows, features, classes = dist.group.WORLD, dist.get_rank(), 320, 8, 200
    width = chunk_sizes(classes, dist.get_world_size())[rank]
    x, target = torch.randn(rows, features, requires_grad=True), some_targets(rows, classes)
    w, b = torch.randn(width, features, requires_grad=True), torch.randn(width, requires_grad=True)

    def loss(chunk_rows=32, **options):
        return tpf.vocab_parallel_linear_cross_entropy(
            x, w, target, b, num_classes=classes, group=group, chunk_rows=chunk_rows, **options
        )

    for grad in (False, True):
        with torch.set_grad_enabled(grad), Allocations() as seen, tpk.log_collectives() as log:
            value = loss()
        inputs = sum(c.tag == "loss_input" for c in log)
        assert len(log) == 20 + inputs and inputs == 10 * grad, log
        assert seen.max_shard_size <= max(32 * width, rows * features, width * features)
        assert value.requires_grad == grad
    with Allocations() as whole:
        F.cross_entropy(F.linear(x, w, b), torch.zeros_like(target))
    assert whole.max_shard_size >= rows * width  # what the check above would have seen

    with tpk.log_collectives() as log:
        value.backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, w, b)]
    value.backward()  # again: the gradients are kept, not the logits
    assert not log
    assert_close([t.grad for t in (x, w, b)], [2 * g for g in first], **EXACT)

    w.requires_grad_(False)
    b.requires_grad_(False)
    x.grad = None
    loss().backward()
    assert_close(x.grad, first[0], **EXACT)
    x.requires_grad_(False)
    w.requires_grad_(True)
    w.grad = None
    with tpk.log_collectives() as log:
        loss().backward()
    assert_close(w.grad, first[1], **EXACT)
    assert not any(c.tag == "loss_input" for c in log)


@run_on_ranks(2)
def test_a_fused_loss_under_autocast():
    x, w, target = torch.randn(9, 16), torch.randn(331, 16), some_targets(9, 331)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sharded_loss(x, w, None, target, 331)
    half = [t.bfloat16() for t in (x, w)]
    truth, same_dtype = (
        stock_loss(*half, None, target, d) for d in (torch.float32, torch.bfloat16)
    )
    assert all(grad.dtype == torch.float32 for grad in ours)
    for name, *values in zip(("loss", "dx", "dw"), ours, same_dtype, truth, strict=True):
        assert_as_accurate(name, *values)


@run_on_ranks(3)
def test_a_fused_loss_refuses_on_every_rank_before_communication():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x, target = torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)
    w, b = (torch.zeros(chunk_sizes(331, world)[rank], *rest) for rest in ((6,), ()))

    def loss(x=x, w=w, target=target, b=b, **options):
        return lambda: tpf.vocab_parallel_linear_cross_entropy(
            x, w, target, b, **{"group": group, "num_classes": 331, **options}
        )

    assert_refused(loss(target=target + 331), IndexError, "target", "331 to 331", "0 to 330")
    assert_refused(loss(target=target.float()), TypeError, "target", "torch.float32")
    assert_refused(loss(target=target[:3]), ValueError, "target", "(3,)", "(4,)")
    assert_refused(loss(reduction="none"), ValueError, "reduction", "'none'", "mean, sum")
    assert_refused(loss(label_smoothing=-0.1), ValueError, "label_smoothing", "-0.1")
    assert_refused(loss(x=x.long(), w=w.long(), b=b.long()), TypeError, "input", "torch.int64")
    assert_refused(loss(num_classes=500), ValueError, "weight_shard", "500")
    assert_refused(loss(x=x[:, :5]), ValueError, "input", "weight_shard", "(4, 5)")
    assert_refused(loss(w=b), ValueError, "weight_shard")
    assert_refused(loss(b=b[1:]), ValueError, "bias_shard")
    assert_refused(loss(w=w.double()), TypeError, "weight_shard", "torch.float64")
    assert_refused(loss(b=b.bfloat16()), TypeError, "bias_shard", "torch.bfloat16")
    assert_refused(loss(chunk_rows=0), ValueError, "chunk_rows", "0")
    assert_refused(loss(chunk_rows=2.0), ValueError, "chunk_rows", "2.0")
