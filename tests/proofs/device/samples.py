"""Small kernels that the gates are tried on: good ones that they must let through, bad ones that
they must refuse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x + offsets, mask=mask).to(tl.float32)
    tl.store(y + offsets, (value * 3).to(y.dtype.element_ty), mask=mask)


@triton.jit
def scale_twice(x, y, n, BLOCK: tl.constexpr):
    """Reads its input again for each half of the output."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    half = tl.program_id(1)
    value = tl.load(x + offsets, mask=offsets < n).to(tl.float32)
    tl.store(
        y + offsets, (value * 3).to(y.dtype.element_ty), mask=(offsets < n) & (offsets % 2 == half)
    )


@triton.jit
def add_bias(x, bias, y, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + row * COLUMNS + column, mask=row < rows).to(tl.float32) + tl.load(
        bias + column
    ).to(tl.float32)
    tl.store(y + row * COLUMNS + column, value.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def matmul(
    a,
    b,
    c,
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_c,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m, n, k = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.program_id(1) * BN + tl.arange(0, BN),
        tl.arange(0, BK),
    )
    pa, pb = a + m[:, None] * stride_a + k[None, :], b + k[:, None] * stride_b + n[None, :]
    sum = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = tl.load(pa, mask=(m[:, None] < M) & (k[None, :] + start < K), other=0.0)
        right = tl.load(pb, mask=(k[:, None] + start < K) & (n[None, :] < N), other=0.0)
        sum = tl.dot(left, right, sum)
        pa += BK
        pb += BK * stride_b
    tl.store(
        c + m[:, None] * stride_c + n[None, :],
        sum.to(c.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


@triton.jit
def matmul_ieee(a, b, c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One tile in float32 proper, for which NVIDIA's tensor cores have no instruction."""
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    left, right = tl.load(a + m * BK + k[None, :]), tl.load(b + k[:, None] * BN + n)
    tl.store(c + m * BN + n, tl.dot(left, right, input_precision="ieee"))


@triton.jit
def column_sum(x, total, rows, COLUMNS: tl.constexpr):
    """Adds with float atomics: another order of programs, another sum."""
    column = tl.arange(0, COLUMNS)
    value = tl.load(x + tl.program_id(0) * COLUMNS + column).to(tl.float32)
    tl.atomic_add(total + column, value)


@triton.jit
def count_positive(x, total, BLOCK: tl.constexpr):
    """An integer atomic, which is exact in any order."""
    value = tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(total, tl.sum((value > 0).to(tl.int32)))


@triton.jit
def softmax(x, y, N: tl.constexpr):
    column = tl.arange(0, N)
    value = tl.load(x + tl.program_id(0) * N + column).to(tl.float32)
    value = tl.exp(value - tl.max(value))
    tl.store(y + tl.program_id(0) * N + column, (value / tl.sum(value)).to(y.dtype.element_ty))


# bfloat16 arithmetic, for the interpreter


@triton.jit
def bf16_round_trip(x, y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets).to(y.dtype.element_ty))


@triton.jit
def bf16_truncate(x, y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def bf16_arithmetic(x, y, out, BLOCK: tl.constexpr):
    """x * y + x, negated where x > y; each step in the arguments' type."""
    offsets = tl.arange(0, BLOCK)
    left, right = tl.load(x + offsets), tl.load(y + offsets)
    value = left * right + left
    tl.store(out + offsets, tl.where(left > right, -value, tl.maximum(value, tl.abs(right))))


@triton.jit
def bf16_constant(x, y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets) * 0.3)


@triton.jit
def bf16_sum(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def bf16_atomic(x, out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def quotient(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, x // y + x % y)


@triton.jit
def largest(x, y, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.maximum(tl.load(x + offsets), tl.load(y + offsets)))


@triton.jit
def copy_rows(x, y, stride_x, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    tl.store(
        y + tl.program_id(0) * COLUMNS + column, tl.load(x + tl.program_id(0) * stride_x + column)
    )


@triton.jit
def load_unmasked(x, y, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets))


@triton.jit
def store_at_address(address, y, BLOCK: tl.constexpr):
    """Copies y to the float32 buffer whose address is the integer `address`."""
    offsets = tl.arange(0, BLOCK)
    tl.store(address.to(tl.int64).to(tl.pointer_type(tl.float32)) + offsets, tl.load(y + offsets))


# Ops, for traffic.measure


def run(op: str) -> dict:
    x = torch.randn(125, 1024, dtype=torch.bfloat16)
    bias, y = torch.randn(1024, dtype=torch.bfloat16), torch.empty_like(x)
    if op == "scale":
        scale[(63,)](x, y, x.numel(), BLOCK=2048)
    elif op == "scale_twice":
        scale_twice[(125, 2)](x, y, x.numel(), BLOCK=1024)
    elif op == "scale through scratch":
        scratch = torch.empty_like(x)
        scale[(63,)](x, scratch, x.numel(), BLOCK=2048)
        scale[(63,)](scratch, y, x.numel(), BLOCK=2048)
    elif op == "add_bias":
        add_bias[(32,)](x, bias, y, 125, COLUMNS=1024, ROWS=4)
        return dict(inputs=dict(x=x, bias=bias), outputs=dict(y=y))
    return dict(inputs=dict(x=x), outputs=dict(y=y))
