"""Row-parallel linear: its autograd Function over the overlap engine, and the functional."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import autocast
from ..group import Group, GroupLike, resolve_group
from ..overlap.schedule import Overlap, check_overlap
from ..sharding.spec import ShardSpec
from .collective_log import log_fake
from .collectives import scatter_to_tp
from .fake import register_fake
from .linear import ReduceOptions, check_operands, chunks_and_channel, wants_grad
from .norm import rms_norm
from .once import once_differentiable

_ops = torch.ops.tpkernels

NormWeightAndEps = tuple[Tensor | None, float]


@register_fake("row_linear")
def _(input, weight, bias, residual, group, chunks, tag, grad=False):
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    log_fake("all_reduce", tag, group, out, chunks)
    return out


@register_fake("row_linear_rms_norm")
def _(input, weight, bias, residual, norm_weight, eps, group, chunks, tag):
    out = _ops.row_linear(input, weight, bias, residual, group, chunks, tag)
    return out, torch.empty_like(out)


@register_fake("row_linear_backward")
def _(grad_output, input, weight, bias_grad):
    n = grad_output.shape[-1]
    grads = []
    if weight is not None:
        grads.append(grad_output.new_empty(*grad_output.shape[:-1], weight.shape[1]))
    if input is not None:
        grads.append(grad_output.new_empty(n, input.shape[-1]))
    if bias_grad:
        grads.append(grad_output.new_empty(n))
    return grads


class _RowLinear(torch.autograd.Function):
    """A linear layer sharded by input features over R ranks.

    x   [..., K / R]   this rank's features
    w   [N, K / R]     y  = sum over ranks of x @ w^T, + b + residual   [..., N]
                       1 all-reduce, in chunks of rows, each under the next chunk's GEMM
    dx  [..., K / R]   = dy @ w                                       no communication
    dw  [N, K / R]     = dy^T @ x
    db  [N]            = sum of dy over rows
    d(residual)        = dy
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, channel, chunks, tag):
        need_x, need_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_w else None, weight if need_x else None)
        grad = any(ctx.needs_input_grad)
        return _ops.row_linear(x, weight, bias, residual, channel, chunks, tag, grad=grad)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b, need_residual = ctx.needs_input_grad[:4]
        grads = iter(_ops.row_linear_backward(dy, x, weight, need_b))
        dx, dw, db = (next(grads) if need else None for need in (need_x, need_w, need_b))
        return dx, dw, db, dy if need_residual else None, None, None, None


def row_linear(
    input: Tensor,  # [..., K / R]
    weight: Tensor,  # [N, K / R]
    bias: Tensor | None,  # [N]
    residual: Tensor | None,  # [..., N]
    options: ReduceOptions,
    norm: NormWeightAndEps | None = None,
):
    """Compute `row_parallel_linear` of this rank's features, for a resolved group."""
    x = input
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = autocast(x, device_type)
        weight = autocast(weight, device_type)
        bias = autocast(bias, device_type)
    check_operands(x, weight, bias, options.group, "row")
    n = weight.shape[0]
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} but the output has {(*x.shape[:-1], n)}"
        )
    tag = options.tag
    chunks, channel = chunks_and_channel(x, n, options)
    # A residual of another dtype, such as a float32 stream under autocast, is added at the end,
    # so that the sum promotes as y + residual does.
    promotes = residual is not None and residual.dtype != x.dtype
    fused_residual = None if promotes else residual
    norm_weight, eps = (None, 0.0) if norm is None else norm
    if norm_weight is not None:
        if norm_weight.shape != (n,):
            raise ValueError(
                f"norm's weight has shape {tuple(norm_weight.shape)} "
                f"but the output has {n} features"
            )
        needs_grad = wants_grad(x, weight, bias, residual, norm_weight)
        if norm_weight.dtype == x.dtype and not promotes and not needs_grad:
            y, normed = _ops.row_linear_rms_norm(
                x, weight, bias, residual, norm_weight, eps, channel, chunks, tag
            )
            return normed, y
    if wants_grad(x, weight, bias, fused_residual):
        y = _RowLinear.apply(x, weight, bias, fused_residual, channel, chunks, tag)
    else:
        y = _ops.row_linear(x, weight, bias, fused_residual, channel, chunks, tag)
    if promotes:
        y = residual + y
    return y if norm is None else (rms_norm(y, *norm), y)


def row_parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: GroupLike = None,
    residual: Tensor | None = None,
    input_is_parallel: bool = True,
    in_spec: ShardSpec | None = None,
    norm: NormWeightAndEps | None = None,
    overlap: Overlap = "auto",
    tag: str = "row_forward",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum input @ weight^T over the ranks, and add bias and residual once.

    Collective: every rank of the group must call it.

    Args:
        input: [..., K / R], this rank's features; with input_is_parallel=False the full [..., K].
        weight: [N, K / R], this rank's columns.
        bias: [N], the same on every rank.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        residual: [..., N], the same on every rank. Bias and residual are added in one pass, under
            the next chunk's all-reduce.
        input_is_parallel: whether the input is sharded already.
        in_spec: which input features each rank has; None for an even division.
        norm: weight [N] or None, and eps, of an RMSNorm of the result. Where no gradient is wanted
            and the all-reduce is small enough for the GPUs' peer memory, one kernel does it all.
        overlap: "auto", False (one chunk) or the number of row chunks. A calibration by `tpk.tune`
            counts only with `in_spec`: without it the ranks' shards may differ, and with them what
            the ranks would choose.
        tag: name in the collective log.

    Returns:
        [..., N], full and bit-equal on every rank; with `norm` (the norm of that, that).

    Raises:
        TypeError: dtypes that do not fit; before any communication.
        ValueError: sizes that do not fit, an unknown overlap; before any communication.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
        >>> row_parallel_linear(x, weight, group=mesh["tp"]).shape
        torch.Size([2, 4])
    """
    check_overlap(overlap)
    group = resolve_group(group)
    x = input
    if not input_is_parallel and weight.dim() == 2:
        if in_spec is None:
            in_spec = ShardSpec.chunks(weight.shape[1] * group.size, group.size, dim=-1)
        x = scatter_input(x, in_spec, group)
    max_shard_size = None if in_spec is None else in_spec.max_shard_size
    options = ReduceOptions(group, max_shard_size, overlap, tag)
    return row_linear(x, weight, bias, residual, options, norm)


def scatter_input(input: Tensor, in_spec: ShardSpec, group: Group) -> Tensor:
    """Return this rank's features of a full input [..., K].

    Collective: every rank of the group must call it, as backward communicates.

    Raises:
        ValueError: the input has another number of features.
    """
    if input.dim() and input.shape[-1] != in_spec.size:
        raise ValueError(
            f"input has {input.shape[-1]} features but the layer takes {in_spec.size} "
            "(input_is_parallel=False: the full input)"
        )
    x = autocast(input, input.device.type)
    if not x.dim():
        return x  # row_linear refuses it
    return scatter_to_tp(x, in_spec, group, "scatter_backward")
