"""Cross entropy over logits split by vocabulary, without gathering them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..group import Group, resolve_group
from ..shard import chunk_sizes
from .embedding import check_in_range, check_integers

_ops = torch.ops.tpkernels


class _VocabCrossEntropy(torch.autograd.Function):
    """z [M, V_r]: this rank's logits; t [M] in [0, V) or ignored; s the label smoothing.

        m     = max over ranks of max z                                           all-reduce 1, [M]
        S, Z, T = sums over ranks of sum exp(z - m), z_t - m and (s > 0) sum z - m  all-reduce 2, [2 or 3, M]
        loss  = log S - (1 - s) Z - s T / V          [M], 0 where ignored
        dz    = (softmax(z) - (1 - s) onehot(t) - s / V) * dloss                  no communication

    The log-sum-exp with the global maximum taken out, as Megatron-LM (Shoeybi et al. 2019, section 3) computes it; the
    smoothing is torch's. Sums are float32 at least; backward recomputes the softmax from the logits instead of keeping it.
    """

    @staticmethod
    def forward(ctx, z, target, first, num_classes, ignore_index, smoothing, group, check_even):
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        rows = z.shape[0]
        # Two spare entries of the maximum tell whether all shards are equally wide.
        top = _ops.empty_comm_buffer(wide, [rows + 2])
        top[:rows] = wide.amax(-1) if z.shape[1] else -torch.inf
        top[rows], top[rows + 1] = z.shape[1], -z.shape[1]
        _ops.all_reduce_(top, group.name, "max", "loss")
        if check_even:
            _check_even(top[rows:], group)
        peak = top[:rows, None]

        local = target - first
        mine = (local >= 0) & (local < z.shape[1])
        local = torch.where(mine, local, 0)
        sums = _ops.empty_comm_buffer(wide, [3 if smoothing else 2, rows])
        sums[0] = (wide - peak).exp_().sum(-1)
        sums[1] = torch.where(mine, wide.gather(1, local[:, None])[:, 0] - peak[:, 0], 0) if z.shape[1] else 0
        if smoothing:
            sums[2] = (wide - peak).sum(-1)
        _ops.all_reduce_(sums, group.name, "sum", "loss")

        kept = target != ignore_index
        log_sum = sums[0].log()
        loss = log_sum - (1 - smoothing) * sums[1]
        if smoothing:
            loss -= smoothing / num_classes * sums[2]
        ctx.save_for_backward(z, peak[:, 0] + log_sum, local, mine, kept)
        ctx.smoothing, ctx.num_classes = smoothing, num_classes
        return torch.where(kept, loss, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z, log_norm, local, mine, kept = ctx.saved_tensors
        dz = (z - log_norm[:, None]).exp_()
        if ctx.smoothing:
            dz -= ctx.smoothing / ctx.num_classes
        if z.shape[1]:
            dz.scatter_add_(1, local[:, None], torch.where(mine, ctx.smoothing - 1.0, 0.0).to(dz.dtype)[:, None])
        dz *= torch.where(kept, dloss, 0)[:, None]
        return dz.to(z.dtype), None, None, None, None, None, None, None


def _check_even(widths: Tensor, group: Group) -> None:
    """`widths`: the maximum over ranks of (width, -width), so that every rank raises or none does."""
    message = f"num_classes=None means an even split, but the {group.size} ranks' logits are not equally wide: pass num_classes"
    if widths.device.type == "cuda":
        torch._assert_async(widths.sum() == 0, message)
    elif not torch._subclasses.fake_tensor.is_fake(widths) and widths.sum() != 0:
        raise ValueError(f"{message} (from {-int(widths[1])} to {int(widths[0])})")


def _check_target(target: Tensor, ignore_index: int, num_classes: int) -> None:
    check_in_range("target", target.masked_fill(target == ignore_index, 0), num_classes, f"{num_classes} classes")


def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    *,
    group=None,
    num_classes: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """torch.nn.functional.cross_entropy over the last dimension of logits whose classes are split over the ranks.

    Two small all-reduces forward, none backward. The loss is float32 for half-precision logits (float64 for float64).

    Args:
        logits_shard: [..., V_r], this rank's classes, in torch.chunk's sizes of num_classes.
        target: [...], class indices or ignore_index, the same on every rank.
        num_classes: V, which gives an uneven shard its offset; None: an even split, checked.
        label_smoothing: in [0, 1].
        reduction: "mean" (over the targets not ignored), "sum" or "none".

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, smoothing outside [0, 1], uneven shards without num_classes.
        IndexError: a target outside the classes (on a GPU a device-side assertion).
    """
    group = resolve_group(group)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not logits_shard.is_floating_point():
        raise TypeError(f"logits_shard must be floating point, got {logits_shard.dtype}")
    if logits_shard.shape[:-1] != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but logits_shard {tuple(logits_shard.shape)} needs {tuple(logits_shard.shape[:-1])}"
        )
    width = logits_shard.shape[-1]
    classes = num_classes if num_classes is not None else width * group.size
    sizes = chunk_sizes(classes, group.size)
    if width != sizes[group.rank]:
        raise ValueError(f"logits_shard has {width} classes on rank {group.rank}, but {classes} split over {group.size} ranks are {sizes}")
    flat = target.reshape(-1)
    check_integers("target", flat)
    if num_classes is not None:
        _check_target(flat, ignore_index, classes)
    loss = _VocabCrossEntropy.apply(
        logits_shard.reshape(flat.numel(), width),
        flat,
        sum(sizes[: group.rank]),
        classes,
        ignore_index,
        label_smoothing,
        group,
        num_classes is None,
    )
    if reduction == "none":
        return loss.view(target.shape)
    total = loss.sum()
    return total / (flat != ignore_index).sum() if reduction == "mean" else total
