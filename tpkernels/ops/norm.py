"""RMSNorm and LayerNorm, with the residual addition before them in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .once import once_differentiable

_ops = torch.ops.tpkernels


@torch.library.register_fake("tpkernels::norm")
def _(input, residual, weight, bias, eps, rms):
    rows, wide = input.shape[:-1].numel(), torch.promote_types(input.dtype, torch.float32)
    total = input.new_empty(0 if residual is None else input.shape)
    return (
        input.new_empty(input.shape),
        total,
        input.new_empty(0 if rms else rows, dtype=wide),
        input.new_empty(rows, dtype=wide),
    )


@torch.library.register_fake("tpkernels::norm_backward")
def _(grad, grad_sum, sum, weight, mean, rstd, rms, weight_grad, bias_grad):
    like = weight if weight is not None else sum
    return [
        sum.new_empty(sum.shape),
        *(like.new_empty(sum.shape[-1]) for need in (weight_grad, bias_grad) if need),
    ]


class _Norm(torch.autograd.Function):
    """x [..., N], r the same or None, w, b [N] or None.

    h   = x + r                                       returned too where there is an r
    y   = (h - mean(h)) / std(h) * w + b              LayerNorm (Ba et al. 2016); eps is added to the biased variance
    y   = h / sqrt(mean(h^2) + eps) * w               RMSNorm (Zhang and Sennrich 2019)
    dx  = dr = the norm's gradient + dh               one pass: h, dy and dh read once
    dw  = sum of dy * (h - mean) / std over rows, db = sum of dy: partial sums in the same pass, no atomics
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, rms):
        y, total, mean, rstd = _ops.norm(x, residual, weight, bias, eps, rms)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.rms = rms
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        h, weight, mean, rstd = ctx.saved_tensors
        need_x, need_r, need_w, need_b = ctx.needs_input_grad[:4]
        if dy is None:
            return dh if need_x else None, dh if need_r else None, None, None, None, None
        dx, *rest = _ops.norm_backward(dy, dh, h, weight, mean, rstd, ctx.rms, need_w, need_b)
        rest = iter(rest)
        dw, db = next(rest) if need_w else None, next(rest) if need_b else None
        return dx if need_x else None, dx if need_r else None, dw, db, None, None


def _norm(input, weight, bias, eps, residual, rms):
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}: cast it first")
    if input.dim() < 1:
        raise ValueError("input must have at least one dimension, [..., N]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != input.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but input has {input.shape[-1]} features"
            )
    if residual is not None:
        if residual.shape != input.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)} but input has {tuple(input.shape)}"
            )
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    return _Norm.apply(input, residual, weight, bias, eps, rms)


def rms_norm(
    input: Tensor, weight: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
):
    """RMSNorm over the last dimension of input, or of input + residual: returns y, or (y, input + residual) with a residual.

    Args:
        input, residual: [..., N].
        weight: [N] or None.

    Raises:
        TypeError, ValueError: input that is not floating point, shapes that do not fit.
    """
    return _norm(input, weight, None, eps, residual, True)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
):
    """LayerNorm over the last dimension; arguments and results as `rms_norm`'s, with a bias [N] or None."""
    return _norm(input, weight, bias, eps, residual, False)
