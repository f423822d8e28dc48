"""The fused ops in plain torch, and how the CPU kernels are compared with them."""

import functools

import pytest
import torch
import torch.nn.functional as F

import tpkernels  # noqa: F401  (registers the ops)

OPS = torch.ops.tpkernels


ACTIVATIONS = ["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]


GATED = {"swiglu": "silu", "geglu": "gelu"}


COLUMNS = [0, 1, 7, 17, 33, 64, 129]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def activate(x, activation):
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"relu": F.relu, "relu2": lambda x: F.relu(x).square(), "gelu": F.gelu, "silu": F.silu}[
        activation
    ](x)


def bias_act(input, bias, activation):
    x = input if bias is None else input + bias
    if activation not in GATED:
        return activate(x, activation)
    gate, up = x.chunk(2, -1)
    return activate(gate, GATED[activation]) * up


def gated_act(gate, up, gate_bias, up_bias, activation):
    gate, up = (x if b is None else x + b for x, b in ((gate, gate_bias), (up, up_bias)))
    return activate(gate, GATED[activation]) * up


def norm(input, residual, weight, bias, eps, rms):
    """The normalised tensor and the sum that it was made of."""
    h = input if residual is None else input + residual
    centred = h if rms else h - h.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), h


def vocab_ce_stats(logits, target, first):
    rows, columns = logits.shape
    top = logits.amax(1) if columns else logits.new_full((rows,), -torch.inf)
    exp = (logits - top.clamp_min(torch.finfo(logits.dtype).min)[:, None]).exp()
    local = target - first
    inside = (local >= 0) & (local < columns)
    at_target = torch.zeros_like(top)
    at_target[inside] = logits[inside, local[inside]]
    return torch.stack([top, exp.sum(1), at_target, logits.sum(1)])


def vocab_ce_grad(logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes):
    columns = vocab_start_index + torch.arange(logits.shape[1])
    grad = (
        (logits - log_norm[:, None]).exp()
        - smoothing / num_classes
        - (1 - smoothing) * (columns == target[:, None]).to(logits.dtype)
    )
    return torch.where(scale[:, None] == 0, 0, grad * scale[:, None])


def philox(seed, row, column):
    """The 32 random bits of one element: Philox4x32-7, in Python's integers."""
    low = 2**32 - 1
    key, counter = (
        [seed & low, seed >> 32 & low],
        [column // 4 & low, row & low, row >> 32 & low, 0],
    )
    for _ in range(7):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter[column % 4]


def dropout(input, seed, p, row, column):
    rows, columns = input.numel() // max(input.shape[-1], 1), input.shape[-1]
    bits = [[philox(int(seed), row + r, column + c) for c in range(columns)] for r in range(rows)]
    kept = torch.tensor(bits, dtype=torch.int64).view(input.shape) >= round(p * 2**32)
    x = input if input.dtype == torch.float64 else input.float()
    return torch.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0.0).to(input.dtype)


def rotary(input, cos, sin, interleaved, inverse):
    half = cos.shape[-1]
    cos, sin = (t.unsqueeze(-3) for t in (cos, -sin if inverse else sin))
    head, rest = input.split([2 * half, input.shape[-1] - 2 * half], -1)
    x1, x2 = (
        (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    )
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.cat(
        [torch.stack([y1, y2], -1).flatten(-2) if interleaved else torch.cat([y1, y2], -1), rest],
        -1,
    )


def in_float64(t):
    """Return the tensor in float64, which is exact enough to be the truth."""
    return (
        t.detach().double().requires_grad_(t.requires_grad)
        if torch.is_tensor(t) and t.is_floating_point()
        else t
    )


def check(outs, function, args):
    """Compare outs with function(*args) in float64 and in the arguments' own dtype.

    The slack is for values near 1.
    """
    truths, plains = function(*map(in_float64, args)), function(*args)
    assert len(outs) == len(truths) == len(plains)
    for out, truth, plain in zip(outs, truths, plains, strict=True):
        assert out.shape == truth.shape and out.dtype in (plain.dtype, torch.float32)
        slack = 1e-13 if plain.dtype == torch.float64 else 1e-6
        if out.numel():
            error, allowed = ((x.double() - truth).abs().max() for x in (out, plain))
            slack *= max(1, truth.abs().max())
            assert error < 2 * allowed + slack, (
                f"error {error:.2e}, torch in {plain.dtype}: {allowed:.2e}"
            )


def with_grads(function):
    """Return a function that returns the gradients of the tensors that require them.

    Its last argument is the gradient of the output.
    """

    def backward(*args):
        *args, grad = args
        leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
        return torch.autograd.grad(function(*args), leaves, grad)

    return backward


def make(*shape, dtype=torch.float32, layout="contiguous", grad=False):
    *leading, columns = shape
    if layout == "half":  # one of two halves packed in a row
        t = torch.randn(*leading, 2 * columns)[..., columns:]
    elif layout == "transposed" and leading:
        t = torch.randn(*leading[:-1], columns, leading[-1]).mT
    else:
        t = torch.randn(*shape)
    return (2 * t).to(dtype).requires_grad_(grad)


def detached(*args):
    return [a.detach() if torch.is_tensor(a) else a for a in args]


class Eager:
    """The ops as a device without kernels of its own runs them."""

    def __getattr__(self, name):
        return functools.partial(
            getattr(OPS, name).default.redispatch,
            torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1),
        )


CASES = [((6,), n, "contiguous") for n in COLUMNS]
CASES += [
    ((), 33, "half"),
    ((2, 3), 17, "half"),
    ((2, 9), 33, "transposed"),
    ((0,), 7, "transposed"),
    ((200,), 129, "half"),
]


cases = pytest.mark.parametrize("leading,columns,layout", CASES, ids=str)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


activations = pytest.mark.parametrize("activation", ACTIVATIONS)
