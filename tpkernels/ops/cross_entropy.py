"""Cross entropy over logits split by vocabulary, without gathering them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..group import Group, resolve_group
from ..shard import chunk_sizes
from .autocast import autocast
from .comm import _log_fake, _log_fake_chunk
from .embedding import check_in_range, check_integers
from .once import once_differentiable

_ops = torch.ops.tpkernels


@torch.library.register_fake("tpkernels::vocab_ce_stats")
def _(logits, target, first):
    return logits.new_empty(4, logits.shape[0], dtype=_wide(logits.dtype))


@torch.library.register_fake("tpkernels::vocab_ce_grad")
def _(logits, target, log_norm, scale, first, on_target, everywhere):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("tpkernels::vocab_ce_grad_")
def _(logits, target, log_norm, scale, first, on_target, everywhere):
    return None


@torch.library.register_fake("tpkernels::vocab_ce")
def _(logits, target, first, num_classes, ignore_index, smoothing, group, tag):
    rows = logits.new_empty(logits.shape[0], dtype=_wide(logits.dtype))
    _log_fake("all_reduce", tag, group, rows.new_empty(logits.shape[0] + 2))
    _log_fake("all_reduce", tag, group, rows.new_empty(3 if smoothing else 2, logits.shape[0]))
    return (
        rows,
        torch.empty_like(rows),
        rows.new_empty(logits.shape[0] + 2)[logits.shape[0] :],
    )  # the end of a buffer


@torch.library.register_fake("tpkernels::vocab_linear_ce")
def _(
    input,
    weight,
    bias,
    target,
    scale,
    first,
    num_classes,
    ignore_index,
    smoothing,
    chunk_rows,
    input_grad,
    weight_grad,
    bias_grad,
    group,
    tag,
):
    rows = input.shape[0]
    chunks = max(1, -(-rows // chunk_rows))
    for i in range(chunks):
        part = input[i * chunk_rows : (i + 1) * chunk_rows]
        torch.ops.tpkernels.vocab_ce(
            part, target, first, num_classes, ignore_index, smoothing, group, tag
        )
        if scale is not None and input_grad:
            _log_fake_chunk("all_reduce", f"{tag}_input", group, part, i, chunks)
    grads = [
        t.new_empty(t.shape)
        for t, need in ((input, input_grad), (weight, weight_grad), (bias, bias_grad))
        if need
    ]
    return [input.new_empty(rows, dtype=_wide(input.dtype)), *grads]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _VocabCrossEntropy(torch.autograd.Function):
    """z [M, V_r]: this rank's logits; t [M] in [0, V) or ignored; s the label smoothing.

        m, e, z_t, u = max z, sum exp(z - m), the target's logit, sum z: in one pass over z   no communication
        P     = max over ranks of m                                                      all-reduce 1, [M]
        S, Z, T = sums over ranks of e exp(m - P), z_t - P and (s > 0) u - V_r P          all-reduce 2, [2 or 3, M]
        loss  = log S - (1 - s) Z - s T / V          [M], 0 where ignored
        dz    = (softmax(z) - (1 - s) onehot(t) - s / V) * dloss      one pass, no communication

    The log-sum-exp with the global maximum taken out, as Megatron-LM (Shoeybi et al. 2019, section 3) computes it, the local one
    online (Milakov and Gimelshein 2018); the smoothing is torch's. Sums are float32 at least; backward recomputes the softmax from
    the logits instead of keeping it.
    """

    @staticmethod
    def forward(ctx, z, target, first, num_classes, ignore_index, smoothing, group, check_even):
        loss, log_norm, widths = _ops.vocab_ce(
            z, target, first, num_classes, ignore_index, smoothing, group.name, "loss"
        )
        if check_even:
            _check_even(widths, group)
        ctx.save_for_backward(z, target, log_norm)
        ctx.options = first, 1 - smoothing, smoothing / num_classes
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z, target, log_norm = ctx.saved_tensors
        scale = dloss.masked_fill(target == ctx.ignore_index, 0)
        # Not in place: the logits may be read by others, an earlier retain_graph among them.
        return (
            _ops.vocab_ce_grad(z, target, log_norm, scale, *ctx.options),
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


class _VocabLinearCrossEntropy(torch.autograd.Function):
    """x [M, K], the same on every rank; w [V_r, K], b [V_r]; t, s as above. The sum of the losses, and its gradients, which stay in the
    range of half precision where a mean's would not.

        z_c   = x_c @ w^T + b                        for a chunk c of rows; its buffer is the next chunk's
        loss  = sum of loss(z), as _VocabCrossEntropy's    2 small all-reduces a chunk
        dz_c  = as _VocabCrossEntropy's              in place: the logits are nobody else's
        dx_c  = sum over ranks of dz_c @ w           one all-reduce a chunk, under dw_c and z_(c + 1)
        dw    = sum over c of dz_c^T @ x_c;  db = sum of dz over rows

    The gradients are computed in forward, where the logits are (as Liger-Kernel's, Hsu et al. 2024), and scaled in backward.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        target,
        first,
        num_classes,
        ignore_index,
        smoothing,
        chunk_rows,
        group,
        record,
    ):
        wanted = [record and need for need in ctx.needs_input_grad[:3]]
        scale = (target != ignore_index).to(_wide(x.dtype)) if any(wanted) else None
        loss, *grads = _ops.vocab_linear_ce(
            x,
            weight,
            bias,
            target,
            scale,
            first,
            num_classes,
            ignore_index,
            smoothing,
            chunk_rows,
            *wanted,
            group.name,
            "loss",
        )
        grads = iter(grads)
        ctx.save_for_backward(*(next(grads) if need else None for need in wanted))
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *(g if g is None else g * dloss for g in ctx.saved_tensors), *[None] * 8


def _check_even(widths: Tensor, group: Group) -> None:
    """`widths`: the maximum over ranks of (width, -width), so that every rank raises or none does."""
    message = f"num_classes=None means an even split, but the {group.size} ranks' logits are not equally wide: pass num_classes"
    if widths.device.type == "cuda":
        torch._assert_async(widths.sum() == 0, message)
    elif not torch._subclasses.fake_tensor.is_fake(widths) and widths.sum() != 0:
        raise ValueError(f"{message} (from {-int(widths[1])} to {int(widths[0])})")


def _check_target(target: Tensor, ignore_index: int, num_classes: int) -> None:
    check_in_range(
        "target",
        target.masked_fill(target == ignore_index, 0),
        num_classes,
        f"{num_classes} classes",
    )


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
    width = logits_shard.shape[-1] if logits_shard.dim() else 0
    classes = num_classes if num_classes is not None else width * group.size
    first = _check(
        "logits_shard",
        logits_shard,
        width,
        target,
        group,
        classes,
        label_smoothing,
        reduction,
        ("mean", "sum", "none"),
    )
    flat = target.reshape(-1)
    if num_classes is not None:
        _check_target(flat, ignore_index, classes)
    loss = _VocabCrossEntropy.apply(
        logits_shard.reshape(flat.numel(), width),
        flat,
        first,
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


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    bias_shard: Tensor | None = None,
    *,
    num_classes: int,
    group=None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """vocab_parallel_cross_entropy(input @ weight_shard^T + bias_shard, target), a chunk of tokens at a time.

    The whole logits are never held: beside the gradients, one chunk of them. The gradients are computed on the way forward, so a
    second backward (retain_graph) works, and a forward under torch.no_grad() computes none of them.

    Args:
        input: [..., K], the same on every rank.
        weight_shard, bias_shard: [V_r, K] and [V_r], this rank's classes, in torch.chunk's sizes of num_classes.
        target: [...], class indices or ignore_index, the same on every rank.
        num_classes: V.
        reduction: "mean" (over the targets not ignored) or "sum".
        chunk_rows: tokens a chunk, the same on every rank; None takes as many as make a chunk's logits about as large as input.

    Raises:
        ValueError, TypeError, IndexError: as vocab_parallel_cross_entropy's; reduction="none".
    """
    group = resolve_group(group)
    device_type = input.device.type
    x, weight, bias = (autocast(t, device_type) for t in (input, weight_shard, bias_shard))
    width = weight.shape[0] if weight.dim() == 2 else -1
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"input has shape {tuple(x.shape)} but weight_shard is {tuple(weight.shape)}: it must be [V_r, {x.shape[-1]}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias_shard has shape {tuple(bias.shape)} but weight_shard has {width} classes"
        )
    for name, tensor in (("weight_shard", weight), ("bias_shard", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but input is {x.dtype}: cast one of them, or run under torch.autocast"
            )
    first = _check(
        "input", x, width, target, group, num_classes, label_smoothing, reduction, ("mean", "sum")
    )
    flat = target.reshape(-1)
    _check_target(flat, ignore_index, num_classes)
    rows, features = flat.numel(), x.shape[-1]
    if chunk_rows is None:
        widest = max(
            chunk_sizes(num_classes, group.size)[0], 1
        )  # rank 0's: every rank takes the same chunks
        chunk_rows = max(256, 1 << (rows * features // widest).bit_length())
    elif not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be an int of at least 1, got {chunk_rows!r}")
    total = _VocabLinearCrossEntropy.apply(
        x.reshape(rows, features),
        weight,
        bias,
        flat,
        first,
        num_classes,
        ignore_index,
        label_smoothing,
        chunk_rows,
        group,
        torch.is_grad_enabled(),
    )
    if reduction == "sum":
        return total
    counted = (flat != ignore_index).sum()
    # Of no tokens the mean is NaN and its gradients are zeros, as torch's are.
    return torch.where(counted > 0, total / counted.clamp_min(1), torch.nan)


def _check(
    name, values, width, target, group, classes, label_smoothing, reduction, reductions
) -> int:
    """Raises before any communication; returns the first of this rank's classes. `values`: [..., one row of them for a target]."""
    if reduction not in reductions:
        raise ValueError(f"reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}")
    if values.shape[:-1] != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but {name} {tuple(values.shape)} needs {tuple(values.shape[:-1])}"
        )
    sizes = chunk_sizes(classes, group.size)
    if width != sizes[group.rank]:
        shard = "weight_shard" if name == "input" else name
        raise ValueError(
            f"{shard} has {width} classes on rank {group.rank}, but {classes} split over {group.size} ranks are {sizes}"
        )
    check_integers("target", target)
    return sum(sizes[: group.rank])
