"""Plain-torch twins of the ops, in one process: the tests' oracle.

A twin takes every rank's shard in a list and does, in that dtype, what the ranks do together: sums over ranks add n partials of
that dtype in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_in_rank_order(partials: Sequence[Tensor]) -> Tensor:
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total


def column_linear(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The output shard [..., N_r] of each rank."""
    return [F.linear(input, w, b) for w, b in zip(weights, biases, strict=True)]


def column_linear_input_grad(grad_outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The input's gradient [..., K]."""
    return sum_in_rank_order([dy @ w for dy, w in zip(grad_outputs, weights, strict=True)])


def row_linear(inputs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """[..., N] from each rank's features [..., K_r] and columns [N, K_r]."""
    y = sum_in_rank_order([x @ w.t() for x, w in zip(inputs, weights, strict=True)])
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def vocab_embedding(ids: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[*ids.shape, H] from each rank's rows of the table."""
    return F.embedding(ids, torch.cat(list(weights)))


def vocab_cross_entropy(logits: Sequence[Tensor], target: Tensor, ignore_index=-100, label_smoothing=0.0, reduction="mean") -> Tensor:
    """Of each rank's logits [..., V_r]."""
    whole = torch.cat(list(logits), -1).float().reshape(-1, sum(z.shape[-1] for z in logits))
    loss = F.cross_entropy(whole, target.reshape(-1), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def bias_act(input: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    x = input if bias is None else input + bias
    if activation is None:
        return x
    if activation == "relu":
        return x.clamp_min(0)
    if activation == "relu2":
        return x.clamp_min(0) * x.clamp_min(0)
    gate, up = (x, 1.0) if activation not in ("swiglu", "geglu") else x.split(x.shape[-1] // 2, -1)
    if activation in ("silu", "swiglu"):
        return gate * torch.sigmoid(gate) * up
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return 0.5 * gate * (1 + torch.erf(gate * 0.5**0.5)) * up
