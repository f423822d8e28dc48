"""Output layer and cross entropy in chunks of tokens, without holding the full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import autocast
from ..group import GroupLike, resolve_group
from ..sharding.spec import chunk_sizes
from .collective_log import log_fake_chunk
from .cross_entropy import check_loss_options, check_shard, check_target_range, opmath_dtype
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("vocab_linear_ce")
def _(
    input,
    weight,
    bias,
    target,
    scale,
    vocab_start_index,
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
    m = input.shape[0]
    chunks = max(1, -(-m // chunk_rows))
    for i in range(chunks):
        rows = input[i * chunk_rows : (i + 1) * chunk_rows]
        _ops.vocab_ce(
            rows, target, vocab_start_index, num_classes, ignore_index, smoothing, group, tag
        )
        if scale is not None and input_grad:
            log_fake_chunk("all_reduce", f"{tag}_input", group, rows, i, chunks)
    loss = input.new_empty(m, dtype=opmath_dtype(input.dtype))
    needs = (input, input_grad), (weight, weight_grad), (bias, bias_grad)
    return [loss, *(t.new_empty(t.shape) for t, need in needs if need)]


class _VocabLinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of x @ w^T + b, and its gradients.

    x [M, K], the same on every rank; w [V_r, K], b [V_r]; t, s as in _VocabCrossEntropy.

    z_c   = x_c @ w^T + b                        for a chunk c of rows; its buffer is the next one's
    loss  = sum of loss(z), as _VocabCrossEntropy's    2 small all-reduces a chunk
    dz_c  = as _VocabCrossEntropy's              in place: the logits are nobody else's
    dx_c  = sum over ranks of dz_c @ w           1 all-reduce a chunk, under dw_c and z_(c + 1)
    dw    = sum over c of dz_c^T @ x_c;  db = sum of dz over rows

    The gradients are computed in forward, where the logits are (as Liger-Kernel's, Hsu et al.
    2024), and scaled in backward. They are the sum's, which stay in the range of half precision
    where a mean's would not.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        target,
        vocab_start_index,
        num_classes,
        ignore_index,
        smoothing,
        chunk_rows,
        group,
        grad_enabled,
    ):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        scale = None
        if any(needs):
            scale = (target != ignore_index).to(opmath_dtype(x.dtype))
        loss, *found = _ops.vocab_linear_ce(
            x,
            weight,
            bias,
            target,
            scale,
            vocab_start_index,
            num_classes,
            ignore_index,
            smoothing,
            chunk_rows,
            *needs,
            group.name,
            "loss",
        )
        grads = iter(found)
        ctx.save_for_backward(*(next(grads) if need else None for need in needs))
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        grads = [None if grad is None else grad * dloss for grad in ctx.saved_tensors]
        return *grads, *[None] * 8


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    bias_shard: Tensor | None = None,
    *,
    num_classes: int,
    group: GroupLike = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """Compute the cross entropy of input @ weight_shard^T + bias_shard in chunks of tokens.

    The full logits are never held: beside the gradients, one chunk of them. The gradients are
    computed in forward, so that a second backward (retain_graph) works. A forward under
    torch.no_grad() computes none.

    Collective: every rank of the group must call it.

    Args:
        input: [..., K], the same on every rank.
        weight_shard: [V_r, K], this rank's classes, in torch.chunk's sizes of num_classes.
        target: [...], class indices or ignore_index, the same on every rank.
        bias_shard: [V_r] or None.
        num_classes: V.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        ignore_index: a target that does not count.
        label_smoothing: in [0, 1].
        reduction: "mean" (over the targets not ignored) or "sum".
        chunk_rows: tokens a chunk, the same on every rank; None takes as many as make a chunk's
            logits about as large as input.

    Returns:
        The loss [], as `vocab_parallel_cross_entropy`'s.

    Raises:
        ValueError: as vocab_parallel_cross_entropy; reduction="none"; chunk_rows below 1.
        TypeError: dtypes that do not fit.
        IndexError: a target outside the classes (on a GPU an assertion on the device).

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> x, weight, target = torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([0, 1, 2])
        >>> vocab_parallel_linear_cross_entropy(
        ...     x, weight, target, num_classes=8, group=mesh["tp"]
        ... )
        tensor(2.0794)
    """
    group = resolve_group(group)
    device_type = input.device.type
    x = autocast(input, device_type)
    weight, bias = autocast(weight_shard, device_type), autocast(bias_shard, device_type)
    _check_output_layer(x, weight, bias)
    check_loss_options(label_smoothing, reduction, ("mean", "sum"))
    vocab_start_index = check_shard("input", x, weight.shape[0], target, group, num_classes)
    flat_target = target.reshape(-1)
    check_target_range(flat_target, ignore_index, num_classes)
    m, k = flat_target.numel(), x.shape[-1]
    if chunk_rows is None:
        # The first rank's shard is the largest, and every rank takes the chunks that fit it.
        max_width = max(chunk_sizes(num_classes, group.size)[0], 1)
        chunk_rows = max(256, 1 << (m * k // max_width).bit_length())
    elif not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be an int of at least 1, got {chunk_rows!r}")
    total = _VocabLinearCrossEntropy.apply(
        x.reshape(m, k),
        weight,
        bias,
        flat_target,
        vocab_start_index,
        num_classes,
        ignore_index,
        label_smoothing,
        chunk_rows,
        group,
        torch.is_grad_enabled(),
    )
    if reduction == "sum":
        return total
    count = (flat_target != ignore_index).sum()
    # The mean over no tokens is NaN and its gradients are zeros, as torch's are.
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def _check_output_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"input has shape {tuple(x.shape)} but weight_shard is {tuple(weight.shape)}: "
            f"it must be [V_r, {x.shape[-1]}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias_shard has shape {tuple(bias.shape)} "
            f"but weight_shard has {weight.shape[0]} classes"
        )
    for name, tensor in (("weight_shard", weight), ("bias_shard", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but input is {x.dtype}: "
                "cast one of them, or run under torch.autocast"
            )
