"""Column-parallel linear: its autograd Functions over the overlap engine, and the functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autocast import autocast
from ..group import GroupLike, resolve_group
from ..kernels.activation_fusion import fuses_activation
from ..overlap.schedule import Overlap, check_overlap
from ..sharding.spec import ShardSpec
from .activation import GATED, bias_act, check_activation
from .collective_log import log_fake
from .collectives import gather_from_tp
from .fake import register_fake
from .linear import (
    ReduceOptions,
    check_operands,
    chunks_and_channel,
    linear,
    linear_fast_path,
    rows_of,
    wants_grad,
)
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("column_linear_backward")
def _(grad_outputs, input, weights, input_grad, weight_grad, bias_grad, group, chunks, tag):
    grads = []
    if input_grad:
        dy, k = grad_outputs[0], weights[0].shape[1]
        grads.append(dy.new_empty(*dy.shape[:-1], k))
        log_fake("all_reduce", tag, group, grads[0], chunks)
    for dy, need in zip(grad_outputs, weight_grad, strict=True):
        if need:
            grads.append(dy.new_empty(dy.shape[-1], input.shape[-1]))
    for dy, need in zip(grad_outputs, bias_grad, strict=True):
        if need:
            grads.append(dy.new_empty(dy.shape[-1]))
    return grads


@register_fake("column_linear_act")
def _(input, weight, bias, activation, keep):
    n, lead = weight.shape[0], input.shape[:-1]
    out = input.new_empty(*lead, n // 2 if activation in GATED else n)
    return out, input.new_empty(*lead, n) if keep else input.new_empty(0)


class _ColumnLinear(torch.autograd.Function):
    """Linear layers i = 0..k-1 that read one input, each sharded by output features over R ranks.

    x     [..., K]       the same on every rank
    w_i   [N_i / R, K]   y_i  = x @ w_i^T + b_i          no communication
    dx    [..., K]       = sum over ranks of sum_i dy_i @ w_i
                         1 all-reduce, in chunks of rows, each under the next chunk's GEMM
    dw_i  [N_i / R, K]   = dy_i^T @ x                    under the last chunks' all-reduces
    db_i  [N_i / R]      = sum of dy_i over rows

    A layer whose output got no gradient takes no part. A tensor that needs no gradient is neither
    saved nor computed.
    """

    @staticmethod
    def forward(ctx, x, channel, chunks, tag, *parameters):
        k = len(parameters) // 2
        weights, biases = parameters[:k], parameters[k:]
        need_x, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[4 : 4 + k]
        ctx.save_for_backward(x if any(need_w) else None, *(weights if need_x else ()))
        ctx.set_materialize_grads(False)
        ctx.channel, ctx.chunks, ctx.tag = channel, chunks, tag
        grad = any(ctx.needs_input_grad)
        return tuple(linear(x, w, b, grad) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        need_x, k = ctx.needs_input_grad[0], len(dys)
        need_w, need_b = ctx.needs_input_grad[4 : 4 + k], ctx.needs_input_grad[4 + k :]
        live = [i for i, dy in enumerate(dys) if dy is not None]
        out: list[Tensor | None] = [None] * (4 + 2 * k)
        if not live:
            return tuple(out)
        if len(live) < k:
            dys = [dys[i] for i in live]
            weights = [weights[i] for i in live] if need_x else []
            need_w, need_b = [need_w[i] for i in live], [need_b[i] for i in live]
        grads = iter(
            _ops.column_linear_backward(
                list(dys),
                x,
                weights,
                need_x,
                list(need_w),
                list(need_b),
                ctx.channel,
                ctx.chunks,
                ctx.tag,
            )
        )
        if need_x:
            out[0] = next(grads)
        for first, needs in ((4, need_w), (4 + k, need_b)):
            for i, need in zip(live, needs, strict=True):
                if need:
                    out[first + i] = next(grads)
        return tuple(out)


class _ColumnLinearAct(torch.autograd.Function):
    """_ColumnLinear and the activation in its GEMM's epilogue.

    y   = act(x @ w^T + b)        p = x @ w^T is stored too where a gradient is needed
    dp  = dy * act'(p + b), db    one pass
    dx, dw                        from dp, as _ColumnLinear's
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation, channel, chunks, tag):
        need_x, need_w = ctx.needs_input_grad[:2]
        keep = any(ctx.needs_input_grad[:3])
        y, pre = _ops.column_linear_act(x, weight, bias, activation, keep)
        ctx.save_for_backward(x if need_w else None, weight if need_x else None, bias, pre)
        ctx.activation, ctx.channel, ctx.chunks, ctx.tag = activation, channel, chunks, tag
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, pre = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dp, *db = _ops.bias_act_backward(dy, pre, bias, ctx.activation, need_b)
        dx = dw = None
        if need_x or need_w:
            grads = _ops.column_linear_backward(
                [dp],
                x,
                [weight] if need_x else [],
                need_x,
                [need_w],
                [False],
                ctx.channel,
                ctx.chunks,
                ctx.tag,
            )
            dx = grads[0] if need_x else None
            dw = grads[-1] if need_w else None
        return dx, dw, db[0] if need_b else None, None, None, None, None


def column_linears(
    input: Tensor,  # [..., K]
    weights: Sequence[Tensor],  # [N_i / R, K]
    biases: Sequence[Tensor | None],  # [N_i / R]
    options: ReduceOptions,
) -> tuple[Tensor, ...]:
    """Compute layers of a fused column group: one backward all-reduce for all of them."""
    if len(weights) == 1 and (y := linear_fast_path(input, weights[0], biases[0])) is not None:
        return (y,)
    device_type = input.device.type
    x = input
    if torch.is_autocast_enabled(device_type):
        x = autocast(x, device_type)
        weights = [autocast(w, device_type) for w in weights]
        biases = [autocast(b, device_type) for b in biases]
    for w, b in zip(weights, biases, strict=True):
        check_operands(x, w, b, options.group, "column")
    if not wants_grad(x, *weights, *biases):
        return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    weight_grad = any(w.requires_grad for w in weights)
    chunks, channel = chunks_and_channel(x, x.shape[-1], options, weight_grad)
    return _ColumnLinear.apply(x, channel, chunks, options.tag, *weights, *biases)


def column_linear_act(
    input: Tensor,  # [..., K]
    weight: Tensor,  # [N / R, K]
    bias: Tensor | None,  # [N / R]
    activation: str,
    options: ReduceOptions,
) -> Tensor:
    """Compute act(input @ weight^T + bias); see `column_linears`.

    The activation runs in the GEMM's epilogue where that is expected to win, else in a pass of its
    own. The bias goes with the activation, not with the GEMM: its gradient then comes out of the
    activation's backward pass.
    """
    device_type = input.device.type
    x = autocast(input, device_type)
    weight, bias = autocast(weight, device_type), autocast(bias, device_type)
    check_operands(x, weight, bias, options.group, "column")
    grad = wants_grad(x, weight, bias)
    n, k = weight.shape
    if not fuses_activation(x.device, x.dtype, rows_of(x), n, k, grad):
        (y,) = column_linears(x, [weight], [None], options)
        return bias_act(y, bias, activation)
    if not grad:
        return _ops.column_linear_act(x, weight, bias, activation, False)[0]
    chunks, channel = chunks_and_channel(x, x.shape[-1], options, weight.requires_grad)
    return _ColumnLinearAct.apply(x, weight, bias, activation, channel, chunks, options.tag)


def column_parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: GroupLike = None,
    activation: str | None = None,
    gather_output: bool = False,
    out_spec: ShardSpec | None = None,
    overlap: Overlap = "auto",
    tag: str = "column_backward",
) -> Tensor:
    """Compute this rank's output features of act(input @ weight^T + bias).

    Collective: every rank of the group must call it, as backward communicates.

    Args:
        input: [..., K], the same on every rank.
        weight: [N / R, K], this rank's rows.
        bias: [N / R], this rank's part.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu".
        gather_output: return the full output. Needs `out_spec` where the ranks do not divide N.
        out_spec: which output features each rank has; None for an even division.
        overlap: "auto", False (one chunk) or the number of row chunks of the backward all-reduce.
            A calibration by `tpk.tune` counts only with `out_spec`: without it the ranks' shards
            may differ, and with them what the ranks would choose.
        tag: name in the collective log.

    Returns:
        [..., N / R]; for gated activations N / 2 in place of N; with gather_output [..., N], the
        same on every rank.

    Raises:
        TypeError: dtypes that do not fit; before any communication.
        ValueError: sizes that do not fit, an unknown activation or overlap; before any
            communication.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> x, weight = torch.ones(2, 3), torch.ones(8, 3)
        >>> column_parallel_linear(x, weight, group=mesh["tp"], activation="swiglu").shape
        torch.Size([2, 4])
    """
    check_overlap(overlap)
    check_activation(activation)
    group = resolve_group(group)
    max_shard_size = None
    if out_spec is not None:
        max_shard_size = out_spec.max_shard_size * (2 if activation in GATED else 1)
    options = ReduceOptions(group, max_shard_size, overlap, tag)
    if activation is None:
        (y,) = column_linears(input, [weight], [bias], options)
    else:
        y = column_linear_act(input, weight, bias, activation, options)
    if gather_output:
        if out_spec is None:
            out_spec = ShardSpec.chunks(y.shape[-1] * group.size, group.size, dim=-1)
        y = gather_from_tp(y, out_spec, group, "gather_output")
    return y
