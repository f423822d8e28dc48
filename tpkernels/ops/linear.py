"""Column- and row-parallel linear layers as autograd Functions over the overlap engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..group import Group, resolve_group
from ..schedule import check_overlap, choose, fuses_activation
from ..shard import Split
from .activation import GATED, bias_act, check_activation
from .autocast import autocast
from .comm import _log_fake, gather, scatter
from .norm import rms_norm
from .once import once_differentiable

_ops = torch.ops.tpkernels


@torch.library.register_fake("tpkernels::row_linear")
def _(input, weight, bias, residual, group, chunks, tag, grad=False):
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    _log_fake("all_reduce", tag, group, out, chunks)
    return out


@torch.library.register_fake("tpkernels::row_linear_rms_norm")
def _(input, weight, bias, residual, norm_weight, eps, group, chunks, tag):
    out = _ops.row_linear(input, weight, bias, residual, group, chunks, tag)
    return out, torch.empty_like(out)


@torch.library.register_fake("tpkernels::linear")
def _(input, weight, bias, grad):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("tpkernels::row_linear_backward")
def _(grad_output, input, weight, bias_grad):
    n = grad_output.shape[-1]
    grads = (
        [grad_output.new_empty(*grad_output.shape[:-1], weight.shape[1])]
        if weight is not None
        else []
    )
    grads += [grad_output.new_empty(n, input.shape[-1])] if input is not None else []
    return grads + [grad_output.new_empty(n)] * bias_grad


@torch.library.register_fake("tpkernels::column_linear_backward")
def _(grad_outputs, input, weights, input_grad, weight_grad, bias_grad, group, chunks, tag):
    grads = []
    if input_grad:
        grads.append(grad_outputs[0].new_empty(*grad_outputs[0].shape[:-1], weights[0].shape[1]))
        _log_fake("all_reduce", tag, group, grads[0], chunks)
    grads += [
        dy.new_empty(dy.shape[-1], input.shape[-1])
        for dy, need in zip(grad_outputs, weight_grad, strict=True)
        if need
    ]
    grads += [
        dy.new_empty(dy.shape[-1]) for dy, need in zip(grad_outputs, bias_grad, strict=True) if need
    ]
    return grads


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, grad: bool = False) -> Tensor:
    """F.linear by what multiplies fastest on this CPU; `grad`: the weight is being trained, so no packed copy of it is kept."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return _ops.linear(x, weight, bias, grad)


class _ColumnLinear(torch.autograd.Function):
    """Linear layers i = 0..k-1 that read one input, each split by output features over R ranks.

        x     [..., K]       the same on every rank
        w_i   [N_i / R, K]   y_i  = x @ w_i^T + b_i          no communication
        dx    [..., K]       = sum over ranks of sum_i dy_i @ w_i   one all-reduce, in chunks of rows, each under the next's GEMM
        dw_i  [N_i / R, K]   = dy_i^T @ x                    under the last chunks' all-reduces
        db_i  [N_i / R]      = sum of dy_i over rows

    A layer whose output got no gradient takes no part. What needs no gradient is neither saved nor computed.
    """

    @staticmethod
    def forward(ctx, x, group, chunks, tag, *parameters):
        k = len(parameters) // 2
        weights, biases = parameters[:k], parameters[k:]
        need_x, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[4 : 4 + k]
        ctx.save_for_backward(x if any(need_w) else None, *(weights if need_x else ()))
        ctx.set_materialize_grads(False)
        ctx.group, ctx.chunks, ctx.tag = group, chunks, tag
        grad = any(ctx.needs_input_grad)
        return tuple(_linear(x, w, b, grad) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        need_x, k = ctx.needs_input_grad[0], len(dys)
        need_w, need_b = ctx.needs_input_grad[4 : 4 + k], ctx.needs_input_grad[4 + k :]
        live = [i for i, dy in enumerate(dys) if dy is not None]
        out: list[Tensor | None] = [None] * (4 + 2 * k)
        if live:
            if len(live) < k:
                dys, weights = [dys[i] for i in live], [weights[i] for i in live] if need_x else []
                need_w, need_b = [need_w[i] for i in live], [need_b[i] for i in live]
            chunks = ctx.chunks
            grads = iter(
                _ops.column_linear_backward(
                    list(dys),
                    x,
                    weights,
                    need_x,
                    list(need_w),
                    list(need_b),
                    ctx.group.channel(chunks),
                    chunks,
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


@torch.library.register_fake("tpkernels::column_linear_act")
def _(input, weight, bias, activation, keep):
    features = weight.shape[0]
    out = input.new_empty(*input.shape[:-1], features // 2 if activation in GATED else features)
    return out, input.new_empty(*input.shape[:-1], features) if keep else input.new_empty(0)


class _ColumnLinearAct(torch.autograd.Function):
    """_ColumnLinear and the activation in its GEMM's epilogue.

    y   = act(x @ w^T + b)        p = x @ w^T is stored too where a gradient is needed, and only there
    dp  = dy * act'(p + b), db    one pass
    dx, dw                        of dp, as _ColumnLinear's
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation, group, chunks, tag):
        need_x, need_w = ctx.needs_input_grad[:2]
        y, pre = _ops.column_linear_act(x, weight, bias, activation, any(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(x if need_w else None, weight if need_x else None, bias, pre)
        ctx.activation, ctx.group, ctx.chunks, ctx.tag = activation, group, chunks, tag
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, pre = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dp, *db = _ops.bias_act_backward(dy, pre, bias, ctx.activation, need_b)
        grads = []
        if need_x or need_w:
            weights, channel = [weight] if need_x else [], ctx.group.channel(ctx.chunks)
            grads = _ops.column_linear_backward(
                [dp], x, weights, need_x, [need_w], [False], channel, ctx.chunks, ctx.tag
            )
        return (
            grads[0] if need_x else None,
            grads[-1] if need_w else None,
            db[0] if need_b else None,
            None,
            None,
            None,
            None,
        )


class _RowLinear(torch.autograd.Function):
    """A linear layer split by input features over R ranks.

    x   [..., K / R]   this rank's features
    w   [N, K / R]     y  = sum over ranks of x @ w^T, + b + residual   one all-reduce, in chunks, each under the next's GEMM
    dx  [..., K / R]   = dy @ w                                       no communication
    dw  [N, K / R]     = dy^T @ x
    db  [N]            = sum of dy over rows;  d(residual) = dy
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, group, chunks, tag):
        need_x, need_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_w else None, weight if need_x else None)
        return _ops.row_linear(
            x,
            weight,
            bias,
            residual,
            group.channel(chunks),
            chunks,
            tag,
            grad=any(ctx.needs_input_grad),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b, need_residual = ctx.needs_input_grad[:4]
        grads = iter(_ops.row_linear_backward(dy, x, weight, need_b))
        dx, dw, db = (next(grads) if need else None for need in (need_x, need_w, need_b))
        return dx, dw, db, dy if need_residual else None, None, None, None


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, kind: str) -> None:
    """Raises before any communication; every rank sees the same mistake."""
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}: embed or cast it first")
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        hint = {
            "column": "a column-parallel layer takes the whole input on every rank",
            "row": "a row-parallel layer takes this rank's features; with input_is_parallel=False it takes the whole input",
        }[kind]
        raise ValueError(
            f"input has shape {tuple(input.shape)} but weight is {tuple(weight.shape)} on rank {group.rank} of {group.size}: "
            f"the last dimension must be {weight.shape[-1]} ({hint})"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but input is {input.dtype}: cast one of them, or run under torch.autocast"
            )
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{name} is on {tensor.device} but input is on {input.device}: move one of them"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        hint = {"column": "this rank's part of the bias", "row": "the whole bias on every rank"}[
            kind
        ]
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} but weight has {weight.shape[0]} output features on rank {group.rank} of {group.size}: pass {hint}"
        )


def linear_now(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """F.linear of CPU tensors that fit, where no gradient, autocast, mode or subclass has a say; None: the caller takes the long way."""
    return None if torch.compiler.is_compiling() else _C.linear_now(input, weight, bias)


def _rows(input: Tensor) -> int:
    return input.numel() // max(input.shape[-1], 1)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _chunks(
    overlap,
    input: Tensor,
    features: int,
    group: Group,
    inner: int | None,
    weight_grad: bool = False,
) -> int:
    """Row chunks of an all-reduce of [rows of input, features]; `inner` and `weight_grad` as `choose` takes them."""
    return choose(
        overlap, _rows(input), features * input.itemsize, group, inner, input.dtype, weight_grad
    ).chunks


def column_linears(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    group: Group,
    overlap="auto",
    tag: str = "column_backward",
    share: int | None = None,
) -> tuple[Tensor, ...]:
    """Column-parallel layers that read one input [..., K]; weights [N_i / R, K]: one backward all-reduce for all of them.

    `share`: output features of all of them on the largest rank; None where the caller does not know that.
    """
    if len(weights) == 1 and (y := linear_now(input, weights[0], biases[0])) is not None:
        return (y,)
    device_type = input.device.type
    x = autocast(input, device_type)
    weights = [autocast(w, device_type) for w in weights]
    biases = [autocast(b, device_type) for b in biases]
    for w, b in zip(weights, biases, strict=True):
        _check(x, w, b, group, "column")
    if not _wants_grad(x, *weights, *biases):
        return tuple(_linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    chunks = _chunks(overlap, x, x.shape[-1], group, share, any(w.requires_grad for w in weights))
    return _ColumnLinear.apply(x, group, chunks, tag, *weights, *biases)


def column_linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    group: Group,
    overlap="auto",
    tag: str = "column_backward",
    share: int | None = None,
) -> Tensor:
    """act(input @ weight^T + bias): the activation in the GEMM's epilogue where that is expected to win, else in a pass of its own.

    Either way the bias goes with the activation, not with the GEMM: its gradient then comes out of the activation's backward pass.
    `share` as in `column_linears`.
    """
    x, weight, bias = (autocast(t, input.device.type) for t in (input, weight, bias))
    _check(x, weight, bias, group, "column")
    record = _wants_grad(x, weight, bias)
    if not fuses_activation(x.device, x.dtype, _rows(x), *weight.shape, record):
        return bias_act(
            *column_linears(x, [weight], [None], group, overlap, tag, share), bias, activation
        )
    if not record:
        return _ops.column_linear_act(x, weight, bias, activation, False)[0]
    chunks = _chunks(overlap, x, x.shape[-1], group, share, weight.requires_grad)
    return _ColumnLinearAct.apply(x, weight, bias, activation, group, chunks, tag)


def column_parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group=None,
    activation: str | None = None,
    gather_output: bool = False,
    out_split: Split | None = None,
    overlap: str | bool | int = "auto",
    tag: str = "column_backward",
) -> Tensor:
    """act(input @ weight^T + bias), this rank's output features.

    Args:
        input: [..., K], the same on every rank.
        weight, bias: [N / R, K] and [N / R]: this rank's rows.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu".
        gather_output: return [..., N], whole on every rank. Needs `out_split` where the ranks do not divide N.
        out_split: which output features each rank has; None for an even split.
        overlap: "auto", False (one chunk) or the number of row chunks of the backward all-reduce. What `tpk.tune` measured counts only
            with `out_split`: without it the ranks' shares may differ, and with them what the ranks would choose.

    Raises:
        TypeError, ValueError: dtypes or sizes that do not fit, an unknown activation or overlap; before any communication.
    """
    check_overlap(overlap)
    check_activation(activation)
    group = resolve_group(group)
    share = None if out_split is None else out_split.largest * (2 if activation in GATED else 1)
    if activation is None:
        (y,) = column_linears(input, [weight], [bias], group, overlap, tag, share)
    else:
        y = column_linear_act(input, weight, bias, activation, group, overlap, tag, share)
    if gather_output:
        if out_split is None:
            out_split = Split.chunks(y.shape[-1] * group.size, group.size, dim=-1)
        y = gather(y, out_split, group, "gather_output")
    return y


def row_parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group=None,
    residual: Tensor | None = None,
    input_is_parallel: bool = True,
    in_split: Split | None = None,
    norm: tuple[Tensor | None, float] | None = None,
    overlap: str | bool | int = "auto",
    tag: str = "row_forward",
):
    """The sum over ranks of input @ weight^T, + bias + residual: [..., N], whole and bit-equal on every rank.

    Args:
        input: [..., K / R], this rank's features; with input_is_parallel=False the whole [..., K].
        weight: [N, K / R], this rank's columns.
        bias: [N], the same on every rank; added once.
        residual: [..., N], the same on every rank; bias and residual are added in one pass, under the next chunk's all-reduce.
        in_split: which input features each rank has; None for an even split.
        norm: the weight [N], or None, and eps of an RMSNorm: returns (norm of the result, result). Where no gradient is wanted and the
            all-reduce is small enough for the GPUs' peer memory, all of it is one kernel.
        overlap: "auto", False (one chunk) or the number of row chunks. What `tpk.tune` measured counts only with `in_split`: without it
            the ranks' shares may differ, and with them what the ranks would choose.

    Raises:
        TypeError, ValueError: dtypes or sizes that do not fit, an unknown overlap; before any communication.
    """
    check_overlap(overlap)
    group = resolve_group(group)
    device_type = input.device.type
    x, weight, bias = (
        autocast(input, device_type),
        autocast(weight, device_type),
        autocast(bias, device_type),
    )
    if not input_is_parallel and x.dim() and weight.dim() == 2:
        if in_split is None:
            in_split = Split.chunks(weight.shape[1] * group.size, group.size, dim=-1)
        if x.shape[-1] != in_split.size:
            raise ValueError(
                f"input has {x.shape[-1]} features but the layer takes {in_split.size} (input_is_parallel=False: the whole input)"
            )
        x = scatter(x, in_split, group, "scatter_backward")
    _check(x, weight, bias, group, "row")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} but the output has {(*x.shape[:-1], weight.shape[0])}"
        )
    chunks = _chunks(
        overlap, x, weight.shape[0], group, None if in_split is None else in_split.largest
    )
    if norm is not None and norm[0] is not None and norm[0].shape != weight.shape[:1]:
        raise ValueError(
            f"norm's weight has shape {tuple(norm[0].shape)} but the output has {weight.shape[0]} features"
        )
    mixed = residual is not None and residual.dtype != x.dtype
    same = norm is not None and norm[0] is not None and norm[0].dtype == x.dtype
    if same and not mixed and not _wants_grad(x, weight, bias, residual, norm[0]):
        y, normed = _ops.row_linear_rms_norm(
            x, weight, bias, residual, *norm, group.channel(chunks), chunks, tag
        )
        return normed, y
    rest = None if mixed else residual
    if _wants_grad(x, weight, bias, rest):
        y = _RowLinear.apply(x, weight, bias, rest, group, chunks, tag)
    else:
        y = _ops.row_linear(x, weight, bias, rest, group.channel(chunks), chunks, tag)
    if mixed:  # as y + residual promotes: a float32 residual stream under autocast
        y = residual + y
    return y if norm is None else (rms_norm(y, *norm), y)
