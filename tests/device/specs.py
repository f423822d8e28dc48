"""The configurations of the project's Triton kernels that the gates compile and measure and that docs/kernels.md lists."""

from __future__ import annotations

from aot import Spec

_MATMUL = dict(
    kernel="samples:matmul",
    signature=dict(a="*bf16", b="*bf16", c="*bf16", M="i32", N="i32", K="i32", stride_a="i32", stride_b="i32", stride_c="i32"),
    kind="gemm",
    divisible=("a", "b", "c", "M", "N", "K", "stride_a", "stride_b", "stride_c"),
)
_SCALE = dict(
    kernel="samples:scale",
    signature=dict(x="*bf16", y="*bf16", n="i32"),
    kind="memory",
    divisible=("x", "y", "n"),
    case="samples:run_scale",
    reads=("x",),
    writes=("y",),
)

SPECS = [
    Spec("scale bf16", constexprs=dict(BLOCK=2048), **_SCALE),
    Spec(
        "add_bias bf16",
        "samples:add_bias",
        dict(x="*bf16", bias="*bf16", y="*bf16", rows="i32"),
        dict(COLUMNS=1024, ROWS=4),
        kind="memory",
        divisible=("x", "bias", "y"),
        case="samples:run_add_bias",
        reads=("x", "bias"),
        writes=("y",),
        cached=("bias",),
    ),
    Spec("matmul 128x128x64", constexprs=dict(BM=128, BN=128, BK=64), num_warps=8, chips=("sm_80", "sm_90", "sm_100"), **_MATMUL),
    Spec("matmul 128x128x64, 2 stages", constexprs=dict(BM=128, BN=128, BK=64), num_warps=8, num_stages=2, chips=("gfx942",), **_MATMUL),
]
