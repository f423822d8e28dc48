"""The reference of every op, in plain torch and one process.

A reference takes every rank's shard in a list and does, in that dtype, what the ranks do together.
A sum over ranks adds n partial sums of that dtype in rank order.
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


def column_linear(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the output shard [..., N_r] of each rank."""
    return [F.linear(input, w, b) for w, b in zip(weights, biases, strict=True)]


def column_linear_input_grad(grad_outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the input's gradient [..., K]."""
    return sum_in_rank_order([dy @ w for dy, w in zip(grad_outputs, weights, strict=True)])


def row_linear(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return [..., N] from each rank's features [..., K_r] and columns [N, K_r]."""
    y = sum_in_rank_order([x @ w.t() for x, w in zip(inputs, weights, strict=True)])
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def vocab_embedding(ids: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return [*ids.shape, H] from each rank's rows of the table."""
    return F.embedding(ids, torch.cat(list(weights)))


def vocab_cross_entropy(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
) -> Tensor:
    """Return the loss from each rank's logits [..., V_r]."""
    whole = torch.cat(list(logits), -1).float().reshape(-1, sum(z.shape[-1] for z in logits))
    loss = F.cross_entropy(
        whole,
        target.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def bias_act(input: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    x = input if bias is None else input + bias
    if activation is None:
        return x
    if activation == "relu":
        return x.relu()  # whose derivative at 0 is 0; clamp_min's is 1
    if activation == "relu2":
        return x.relu() * x.relu()
    gate, up = (x, 1.0) if activation not in ("swiglu", "geglu") else x.split(x.shape[-1] // 2, -1)
    if activation in ("silu", "swiglu"):
        return gate * torch.sigmoid(gate) * up
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return 0.5 * gate * (1 + torch.erf(gate * 0.5**0.5)) * up


def gated_act(
    gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    return bias_act(
        torch.cat([gate, up], -1),
        None if gate_bias is None else torch.cat([gate_bias, up_bias]),
        activation,
    )


def norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalised tensor, the sum, and the mean and rstd of each row.

    The sum with the residual has the input's shape, or is empty without a residual. The mean [M]
    is empty for RMSNorm; it and rstd [M] are at least float32.
    """
    h = input if residual is None else input + residual
    if rms:
        y = F.rms_norm(h, h.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    x = _opmath(h).flatten(0, -2) if h.dim() > 1 else _opmath(h)[None]
    mean = x.new_empty(0) if rms else x.mean(-1)
    variance = x.square().mean(-1) if rms else x.var(-1, correction=0)
    return y, input.new_empty(0) if residual is None else h, mean, torch.rsqrt(variance + eps)


def vocab_ce_stats(logits: Tensor, target: Tensor, first: int) -> Tensor:
    """Return statistics [4, M] of a rank's logits [M, V/n].

    They are the maximum, the sum of exp(z - maximum), the target's logit (0 if another rank has
    it) and the sum of z. The columns are the vocabulary's from `first` on.
    """
    z = _opmath(logits)
    most = F.pad(z, (0, 1), value=-torch.inf).amax(-1)
    sum_exp = torch.where(most == -torch.inf, 0, torch.exp(z - most[:, None]).sum(-1))
    column = target.long() - first
    column = torch.where((column >= 0) & (column < z.shape[1]), column, z.shape[1])
    return torch.stack(
        [most, sum_exp, F.pad(z, (0, 1)).gather(1, column[:, None])[:, 0], z.sum(-1)]
    )


def vocab_ce_grad(
    logits: Tensor,
    target: Tensor,
    log_norm: Tensor,
    scale: Tensor,
    first: int,
    smoothing: float,
    num_classes: int,
) -> Tensor:
    """(softmax - (1 - s) onehot(target) - s / V) * scale, 0 in rows whose scale is 0: [M, V/n]."""
    hit = torch.arange(logits.shape[1], device=logits.device) == (target.long() - first)[:, None]
    softmax = torch.exp(_opmath(logits) - log_norm[:, None])
    at_target = (1 - smoothing) * hit.to(softmax.dtype)
    grad = (softmax - smoothing / num_classes - at_target) * scale[:, None]
    return torch.where(scale[:, None] == 0, 0, grad).to(logits.dtype)


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int], rounds: int) -> list[Tensor]:
    """Return four 32-bit numbers, as int64, of each counter of four.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    low, (c0, c1, c2, c3), (k0, k1) = 0xFFFFFFFF, counter, key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, which the bits of int64 are
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def dropout(input: Tensor, seed: Tensor, p: float, row: int, column: int) -> Tensor:
    """Drop elements [..., N] of a tensor whose first is at (row, column) of the whole one.

    An element's fate is a function of the seed and its place in the whole tensor alone.
    """
    x = (
        _opmath(input).reshape(-1, input.shape[-1])
        if input.numel()
        else _opmath(input).new_empty(0, input.shape[-1])
    )
    r = torch.arange(row, row + x.shape[0], device=x.device)[:, None]
    c = torch.arange(column, column + x.shape[1], device=x.device)[None, :]
    counter = (c // 4 + 0 * r, r & 0xFFFFFFFF, r >> 32 & 0xFFFFFFFF, torch.zeros_like(r))
    bits = torch.stack(
        torch.broadcast_tensors(
            *philox4x32(counter, (int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF), 7)
        )
    )
    random = bits.gather(0, (c % 4 + 0 * r)[None])[0]
    kept = random >= round(p * 2**32)
    return (
        torch.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0).to(input.dtype).view(input.shape)
    )


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] features of input [B, H, T, D].

    cos and sin are [T, R / 2] or [B, T, R / 2].
    """
    half = cos.shape[-1]
    cos, sin = (t if t.dim() == 2 else t[:, None] for t in (cos, -sin if inverse else sin))
    turned, rest = input.split([2 * half, input.shape[-1] - 2 * half], -1)
    a, b = (
        turned.unflatten(-1, (half, 2)).unbind(-1)
        if interleaved
        else turned.unflatten(-1, (2, half)).unbind(-2)
    )
    pair = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2)
    return torch.cat([pair.flatten(-2), rest], -1)


def _opmath(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
