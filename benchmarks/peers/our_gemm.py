"""The plain layers with tpkernels' GEMMs, over its all-reduce: no overlap and nothing fused.

Beside the plain layers over the same all-reduce they show the gain of the GEMMs alone; tpkernels
beside them shows the gain of the overlapped, fused ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import our_all_reduce

ops = torch.ops.tpkernels


def unavailable() -> str | None:
    return None


class _Linear(torch.autograd.Function):
    """F.linear with tpkernels' choice of GEMM for each of its three products.

    x   [M, K]
    w   [N, K]    y  = x @ w^T + b
    dx  [M, K]    = dy @ w
    dw  [N, K]    = dy^T @ x
    db  [N]       = sum of dy over rows
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return ops.linear(x, weight, bias, True)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        x, weight = x if need_w else None, weight if need_x else None
        grads = iter(ops.row_linear_backward(dy, x, weight, need_b))
        return tuple(next(grads) if need else None for need in ctx.needs_input_grad)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns F.linear's result. Without a gradient the GEMM takes a packed copy of the weight."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)  # as tpkernels does on GPUs
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return ops.linear(x, weight, bias, False)


class Peer(our_all_reduce.Peer):
    linear = staticmethod(linear)
