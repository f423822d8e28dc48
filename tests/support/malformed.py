"""Malformed arguments of an op: good ones of tests/support/op_samples.py, of which some change.

Everything follows from the random generator, so that a seed and a number name a call.
"""

import math
import random

import torch
from op_samples import rand

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
INTEGERS = (-(2**63), -(2**31), -100, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**62, 2**63 - 1)
FLOATS = (-math.inf, -1.0, -0.0, 0.0, 1e-300, 0.5, 1.0, 1.5, 1e30, math.inf, math.nan)
STRINGS = ("", "sum", "gelu", "swiglu", "no such name", "x" * 300, "\u00e9\u4e2d", "a\0b")


def _resized(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Change the size of one dimension."""
    if not t.dim():
        return t
    shape = list(t.shape)
    dim = rng.randrange(t.dim())
    n = shape[dim]
    shape[dim] = rng.choice((0, 1, max(n - 1, 0), n + 1, 2 * n, 37))
    return torch.ones(shape).to(t.dtype)


def _recast(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return t.to(rng.choice(DTYPES))


def _relaid(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Keep shape and values, in other strides at another offset."""
    if not t.dim():
        return t
    dim = rng.randrange(t.dim())
    wide = torch.stack((t, t), dim + 1).flatten(dim, dim + 1)
    step = wide.narrow(dim, 1, wide.shape[dim] - 1) if wide.shape[dim] else wide
    return step[(slice(None),) * dim + (slice(None, None, 2),)]


def _transposed(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return t.transpose(0, -1) if t.dim() else t


def _expanded(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Let one element stand for a whole dimension, or for all of them."""
    if not t.numel() or not t.dim():
        return t
    dim = rng.randrange(t.dim())
    first = t.flatten()[0] if rng.random() < 0.3 else t.narrow(dim, 0, 1)
    return first.expand(t.shape)


def _relayout(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    kind = rng.choice(("coo", "csr", "mkldnn", "nested"))
    if kind == "csr" and t.dim() == 2:
        return t.to_sparse_csr()
    if kind == "mkldnn" and t.dtype == torch.float32 and t.dim():
        return t.to_mkldnn()
    if kind == "nested" and t.dim():
        return torch.nested.nested_tensor([t, t])
    return t.to_sparse()


def _freed(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Take the memory away, or the last half of it, as FSDP does between uses."""
    t = t.clone()
    t.untyped_storage().resize_(rng.choice((0, t.untyped_storage().nbytes() // 2)))
    return t


def _special(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Fill with a value that arithmetic or an index may not survive."""
    floats = (math.nan, math.inf, -math.inf, 1e30)
    values = floats if t.is_floating_point() else (-1, 2**30, -(2**31))
    return torch.full_like(t, rng.choice(values)) if t.dtype != torch.bool else t


TENSORS = (
    lambda t, rng: torch.tensor(1).to(t.dtype),
    lambda t, rng: t.unsqueeze(rng.randint(0, t.dim())),
    lambda t, rng: t[0] if t.dim() and len(t) else t,
    lambda t, rng: t.flatten(),
    lambda t, rng: t.new_empty(0),
    lambda t, rng: t.to("meta"),
    lambda t, rng: t._neg_view() if t.is_floating_point() else t,
    lambda t, rng: t.clone().requires_grad_() if t.is_floating_point() else t,
    _resized,
    _resized,
    _resized,
    _recast,
    _recast,
    _relaid,
    _transposed,
    _expanded,
    _relayout,
    _freed,
    _special,
)


def _changed_list(values: list, rng: random.Random) -> list:
    kind = rng.randrange(4)
    if kind == 0 or not values:
        return []
    if kind == 1:
        return values[:-1]
    if kind == 2:
        return [*values, rng.choice(values)]
    i = rng.randrange(len(values))
    return [*values[:i], change(values[i], "", rng), *values[i + 1 :]]


def change(value: object, kind: str, rng: random.Random) -> object:
    """Return another value for an argument of the schema's type `kind`."""
    if kind.startswith("Optional[") and rng.random() < 0.25:
        return None if value is not None else rand(rng.randint(0, 6))
    if isinstance(value, torch.Tensor):
        return rng.choice(TENSORS)(value, rng)
    if isinstance(value, list):
        return _changed_list(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, str):
        return rng.choice(STRINGS)
    return rand(4) if value is None else rng.choice(DTYPES)


def malformed(op: torch._ops.OpOverload, sample: tuple, rng: random.Random) -> list:
    """Return the sample with one to three arguments changed, or one in the place of another."""
    schema = [str(argument.type) for argument in op._schema.arguments]
    arguments = list(sample)
    tensors = [a for a in sample if isinstance(a, torch.Tensor)]
    count = min(rng.choice((1, 1, 1, 2, 3)), len(arguments))
    for i in rng.sample(range(len(arguments)), count):
        if isinstance(arguments[i], torch.Tensor) and rng.random() < 0.08:
            arguments[i] = rng.choice(tensors)
        elif rng.random() < 0.03:
            arguments[i] = rng.choice((None, "text", 1, 0.5, [], rand(2)))
        else:
            arguments[i] = change(arguments[i], schema[i], rng)
    return arguments


def has_memory(t: torch.Tensor) -> bool:
    """Return True if the storage holds all elements of a dense tensor."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + last + 1) * t.itemsize
    return not t.numel() or t.untyped_storage().nbytes() >= needed


def described(value: object) -> str:
    """Return a short text of an argument."""
    if isinstance(value, list):
        return "[" + ", ".join(map(described, value)) + "]"
    if not isinstance(value, torch.Tensor):
        return repr(value)[:40]
    text = f"{str(value.dtype)[6:]}{tuple(value.shape) if not value.is_nested else ' nested'}"
    if value.layout != torch.strided or value.is_nested:
        return f"{text} {value.layout}"
    facts = {
        f"strides {value.stride()}": not value.is_contiguous(),
        f"on {value.device}": value.device.type != "cpu",
        "negated": value.is_neg(),
        "with grad": value.requires_grad,
        f"of {value.untyped_storage().nbytes()} bytes": not has_memory(value),
    }
    return " ".join([text, *(fact for fact, holds in facts.items() if holds)])
