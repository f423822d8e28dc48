"""Cross entropy over logits sharded by vocabulary, without gathering them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..group import Group, GroupLike, resolve_group
from ..sharding.spec import chunk_sizes
from .checks import check_in_range, check_integers
from .collective_log import log_fake
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulate dtype of the loss: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@register_fake("vocab_ce_stats")
def _(logits, target, vocab_start_index):
    return logits.new_empty(4, logits.shape[0], dtype=opmath_dtype(logits.dtype))


@register_fake("vocab_ce_grad")
def _(logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes):
    return logits.new_empty(logits.shape)


@register_fake("vocab_ce_grad_")
def _(logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes):
    return None


@register_fake("vocab_ce")
def _(logits, target, vocab_start_index, num_classes, ignore_index, smoothing, group, tag):
    m = logits.shape[0]
    loss = logits.new_empty(m, dtype=opmath_dtype(logits.dtype))
    log_fake("all_reduce", tag, group, loss.new_empty(m + 2))
    log_fake("all_reduce", tag, group, loss.new_empty(3 if smoothing else 2, m))
    widths = loss.new_empty(m + 2)[m:]  # the end of a buffer
    return loss, torch.empty_like(loss), widths


class _VocabCrossEntropy(torch.autograd.Function):
    """z [M, V_r]: this rank's logits; t [M] in [0, V) or ignored; s the label smoothing.

    m, e, z_t, u = max z, sum exp(z - m), the target's logit, sum z: in one pass over z
    P       = max over ranks of m                                                 all-reduce 1, [M]
    S, Z, T = sums over ranks of e exp(m - P), z_t - P and (s > 0) u - V_r P      all-reduce 2,
                                                                                  [2 or 3, M]
    loss    = log S - (1 - s) Z - s T / V          [M], 0 where ignored
    dz      = (softmax(z) - (1 - s) onehot(t) - s / V) * dloss      one pass, no communication

    The log-sum-exp takes the global maximum out, as Megatron-LM does (Shoeybi et al. 2019, section
    3). The local one is computed online (Milakov and Gimelshein 2018). The smoothing is torch's.
    Sums are float32 at least. Backward recomputes the softmax from the logits.
    """

    @staticmethod
    def forward(
        ctx,
        z,
        target,
        vocab_start_index,
        num_classes,
        ignore_index,
        smoothing,
        group,
        check_even,
    ):
        loss, log_norm, widths = _ops.vocab_ce(
            z, target, vocab_start_index, num_classes, ignore_index, smoothing, group.name, "loss"
        )
        if check_even:
            _check_even(widths, group)
        ctx.save_for_backward(z, target, log_norm)
        ctx.options = vocab_start_index, smoothing, num_classes
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z, target, log_norm = ctx.saved_tensors
        scale = dloss.masked_fill(target == ctx.ignore_index, 0)
        # Not in place: others may read the logits, an earlier retain_graph among them.
        dz = _ops.vocab_ce_grad(z, target, log_norm, scale, *ctx.options)
        return dz, None, None, None, None, None, None, None


def _check_even(widths: Tensor, group: Group) -> None:
    """Raise on every rank if the ranks' logits are not equally wide.

    Args:
        widths: the maximum over ranks of (width, -width).
        group: for the message.
    """
    message = (
        f"num_classes=None means an even division, but the {group.size} ranks' logits are not "
        "equally wide: pass num_classes"
    )
    if widths.device.type == "cuda":
        torch.ops.aten._assert_async.msg(widths.sum() == 0, message)
    elif not is_fake(widths) and widths.sum() != 0:
        raise ValueError(f"{message} (from {-int(widths[1])} to {int(widths[0])})")


def check_target_range(target: Tensor, ignore_index: int, num_classes: int) -> None:
    """Raise IndexError for a target outside the classes that is not ignored."""
    counted = target.masked_fill(target == ignore_index, 0)
    check_in_range("target", counted, num_classes, f"{num_classes} classes")


def check_loss_options(label_smoothing: float, reduction: str, reductions: tuple[str, ...]) -> None:
    """Raise ValueError for options that the loss does not have."""
    if reduction not in reductions:
        raise ValueError(f"reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_shard(
    name: str, values: Tensor, width: int, target: Tensor, group: Group, num_classes: int
) -> int:
    """Check the operands of a loss before any communication.

    Args:
        name: of `values`, for the messages: "logits_shard", or "input" of the output layer.
        values: [..., any], one row for each target.
        width: classes of this rank's shard.
        target: [...].
        group: the tensor-parallel group.
        num_classes: V.

    Returns:
        vocab_start_index, the first of this rank's classes.
    """
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}")
    if values.shape[:-1] != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, "
            f"but {name} {tuple(values.shape)} needs {tuple(values.shape[:-1])}"
        )
    sizes = chunk_sizes(num_classes, group.size)
    if width != sizes[group.rank]:
        shard = "weight_shard" if name == "input" else name
        raise ValueError(
            f"{shard} has {width} classes on rank {group.rank}, "
            f"but {num_classes} sharded over {group.size} ranks are {sizes}"
        )
    check_integers("target", target)
    return sum(sizes[: group.rank])


def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    *,
    group: GroupLike = None,
    num_classes: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute torch's cross_entropy of logits whose classes are sharded over the ranks.

    Two small all-reduces forward, none backward.

    Collective: every rank of the group must call it.

    Args:
        logits_shard: [..., V_r], this rank's classes, in torch.chunk's sizes of num_classes.
        target: [...], class indices or ignore_index, the same on every rank.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        num_classes: V, which gives an uneven shard its offset; None: an even division, checked.
        ignore_index: a target that does not count.
        label_smoothing: in [0, 1].
        reduction: "mean" (over the targets not ignored), "sum" or "none".

    Returns:
        The loss, [] or with "none" [...]; float32 for half-precision logits, float64 for float64.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, smoothing outside [0, 1], uneven
            shards without num_classes.
        TypeError: logits that are not floating point, targets that are not integers.
        IndexError: a target outside the classes (on a GPU an assertion on the device).

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> logits, target = torch.zeros(3, 8), torch.tensor([0, 1, 2])
        >>> vocab_parallel_cross_entropy(logits, target, group=mesh["tp"])
        tensor(2.0794)
    """
    group = resolve_group(group)
    check_loss_options(label_smoothing, reduction, ("mean", "sum", "none"))
    width = logits_shard.shape[-1] if logits_shard.dim() else 0
    classes = width * group.size if num_classes is None else num_classes
    vocab_start_index = check_shard("logits_shard", logits_shard, width, target, group, classes)
    flat_target = target.reshape(-1)
    if num_classes is not None:
        check_target_range(flat_target, ignore_index, classes)
    loss = _VocabCrossEntropy.apply(
        logits_shard.reshape(flat_target.numel(), width),
        flat_target,
        vocab_start_index,
        classes,
        ignore_index,
        label_smoothing,
        group,
        num_classes is None,
    )
    if reduction == "none":
        return loss.view(target.shape)
    total = loss.sum()
    return total / (flat_target != ignore_index).sum() if reduction == "mean" else total
