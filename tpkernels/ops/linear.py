"""Shared by the column- and row-parallel linear: one rank's product, checks and the schedule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..group import Group
from ..overlap.schedule import Overlap, choose
from .fake import register_fake

_ops = torch.ops.tpkernels

MAX_REMEMBERED = 4096  # schedules that a group keeps: the batches of a server vary

_INPUT_HINTS = {
    "column": "a column-parallel layer takes the full input on every rank",
    "row": "a row-parallel layer takes this rank's features; "
    "with input_is_parallel=False it takes the full input",
}
_BIAS_HINTS = {
    "column": "this rank's part of the bias",
    "row": "the full bias on every rank",
}


@register_fake("linear")
def _(input, weight, bias, grad):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


class ReduceOptions(NamedTuple):
    """How the all-reduce of a layer runs.

    Attributes:
        group: the tensor-parallel group.
        max_shard_size: sharded features on the largest rank: N / R of a column layer, summed over
            a fused column group, or K / R of a row layer. None where the caller does not know it.
        overlap: "auto", False or a number of row chunks.
        tag: name in the collective log.
    """

    group: Group
    max_shard_size: int | None
    overlap: Overlap
    tag: str


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, grad: bool = False) -> Tensor:
    """Compute F.linear with the GEMM that is fastest on this CPU.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        grad: the weight is being trained, so no packed copy of it is kept.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return _ops.linear(x, weight, bias, grad)


def linear_fast_path(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Inference fast path for plain CPU tensors; None if it does not apply.

    It does not apply under autocast or a mode, to subclasses, to operands that do not fit, and
    where a gradient is wanted.
    """
    return None if torch.compiler.is_compiling() else _C.linear_fast_path(input, weight, bias)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Return True if gradients are recorded and any of `tensors` requires one."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows_of(x: Tensor) -> int:
    """Return M of x [..., K] seen as [M, K]."""
    return x.numel() // max(x.shape[-1], 1)


def chunks_and_channel(
    x: Tensor, n: int, options: ReduceOptions, weight_grad: bool = False
) -> tuple[int, str]:
    """Return the row chunks of an all-reduce of [M, n] and the process group that carries it.

    Args:
        x: [..., any], whose M rows and dtype the all-reduce has.
        n: features of the all-reduce.
        options: the layer's.
        weight_grad: as `choose` takes it.
    """
    group, k, overlap, _ = options
    m, row_bytes, is_compiling = rows_of(x), n * x.itemsize, torch.compiler.is_compiling()
    key = overlap, m, row_bytes, k, x.dtype, weight_grad
    found = None if is_compiling else group.schedules.get(key)
    if found is None:
        chunks = choose(overlap, m, row_bytes, group, k, x.dtype, weight_grad).chunks
        found = chunks, group.channels[chunks > 1]
        if not is_compiling:
            if len(group.schedules) >= MAX_REMEMBERED:
                group.schedules.clear()
            group.schedules[key] = found
    return found


def check_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, group: Group, kind: str
) -> None:
    """Raise before any communication; every rank sees the same mistake.

    Args:
        input: [..., K].
        weight: [N, K].
        bias: [N] or None.
        group: for the message.
        kind: "column" or "row".

    Raises:
        TypeError: an integer input, dtypes that differ.
        ValueError: shapes or devices that do not fit.
    """
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}: embed or cast it first")
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [N, K], got shape {tuple(weight.shape)}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)} but weight is {tuple(weight.shape)} "
            f"on rank {group.rank} of {group.size}: the last dimension must be "
            f"{weight.shape[-1]} ({_INPUT_HINTS[kind]})"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but input is {input.dtype}: "
                "cast one of them, or run under torch.autocast"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name} is on {tensor.device} but input is on {input.device}: move one of them"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} but weight has {weight.shape[0]} output features "
            f"on rank {group.rank} of {group.size}: pass {_BIAS_HINTS[kind]}"
        )
