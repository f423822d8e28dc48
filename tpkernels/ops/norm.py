"""RMSNorm and LayerNorm, with the residual addition before them in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_features, check_rows
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("norm")
def _(input, residual, weight, bias, eps, rms):
    m, opmath_dtype = input.shape[:-1].numel(), torch.promote_types(input.dtype, torch.float32)
    total = input.new_empty(0 if residual is None else input.shape)
    mean = input.new_empty(0 if rms else m, dtype=opmath_dtype)
    return input.new_empty(input.shape), total, mean, input.new_empty(m, dtype=opmath_dtype)


@register_fake("norm_backward")
def _(grad, grad_sum, sum, weight, mean, rstd, rms, weight_grad, bias_grad):
    like = sum if weight is None else weight
    parameter_grads = [like.new_empty(sum.shape[-1]) for need in (weight_grad, bias_grad) if need]
    return [sum.new_empty(sum.shape), *parameter_grads]


class _Norm(torch.autograd.Function):
    """y = norm(x + residual).

    x   [..., N]    residual the same or None    w, b [N] or None
    h   = x + residual                           returned too where there is a residual
    y   = (h - mean(h)) / std(h) * w + b         LayerNorm (Ba et al. 2016); eps is added to the
                                                 biased variance
    y   = h / sqrt(mean(h^2) + eps) * w          RMSNorm (Zhang and Sennrich 2019)
    dx  = d(residual) = the norm's gradient + dh     one pass: h, dy and dh read once
    dw  = sum of dy * (h - mean) / std over rows, db = sum of dy
                                                 partial sums in the same pass, no atomics
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
        need_x, need_residual, need_w, need_b = ctx.needs_input_grad[:4]
        dx, dw, db = dh, None, None
        if dy is not None:
            dx, *rest = _ops.norm_backward(dy, dh, h, weight, mean, rstd, ctx.rms, need_w, need_b)
            parameter_grads = iter(rest)
            dw = next(parameter_grads) if need_w else None
            db = next(parameter_grads) if need_b else None
        return dx if need_x else None, dx if need_residual else None, dw, db, None, None


def _norm(input, weight, bias, eps, residual, rms):
    check_rows(input)
    check_features("weight", weight, input)
    check_features("bias", bias, input)
    if residual is not None:
        if residual.shape != input.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)} but input has {tuple(input.shape)}"
            )
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    return _Norm.apply(input, residual, weight, bias, eps, rms)


def rms_norm(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
):
    """Compute RMSNorm over the last dimension of input + residual, in one pass.

    Args:
        input: [..., N].
        weight: [N] or None.
        eps: added to the mean of squares.
        residual: [..., N] or None.

    Returns:
        y [..., N], or with a residual (y, input + residual).

    Raises:
        TypeError: input is not floating point.
        ValueError: shapes that do not fit.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), eps=0.0).square().mean()
        tensor(1.)
    """
    return _norm(input, weight, None, eps, residual, True)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
):
    """Compute LayerNorm over the last dimension of input + residual, in one pass.

    Args:
        input: [..., N].
        weight: [N] or None.
        bias: [N] or None.
        eps: added to the variance.
        residual: [..., N] or None.

    Returns:
        y [..., N], or with a residual (y, input + residual).

    Raises:
        TypeError: input is not floating point.
        ValueError: shapes that do not fit.

    Example:
        >>> layer_norm(torch.tensor([1.0, 3.0]), eps=0.0)
        tensor([-1.,  1.])
    """
    return _norm(input, weight, bias, eps, residual, False)
