"""Every GEMM of the CPU, forced: exact on integers and as accurate as torch. The choice."""

import pytest
import torch
import torch.nn.functional as F
from gemms import GEMMS, IDS, OPS, Library, can, forced, integers
from helpers import EXACT, assert_as_accurate, truth_dtype
from torch.testing import assert_close

from tpkernels import _C

SHAPES = [
    (1, 300, 7),
    (5, 64, 96),
    (130, 33, 17),
    (0, 8, 8),
    (4, 0, 8),
    (4, 8, 0),
    (1, 1, 1),
    (3, 2, 1030),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_every_gemm_is_exact_on_integers(gemm, dtype):
    if not can(gemm, dtype):
        pytest.skip("oneDNN has no arithmetic for this dtype on this machine")
    for rows, k, n in SHAPES:
        x, w, b, dy = (
            integers(*shape, dtype=dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))
        )
        layouts = [
            (x, w),
            (
                integers(rows, 2 * k, dtype=dtype)[:, :k],
                w.t().contiguous().t(),
            ),  # strided rows, a transposed weight
            (
                integers(k, rows, dtype=dtype).t(),
                integers(n, 2 * k, dtype=dtype)[:, ::2][:, :k],
            ),  # nothing contiguous
        ]
        for x, w in layouts:
            for bias in (None, b):
                want = F.linear(x.double(), w.double(), None if bias is None else bias.double()).to(
                    dtype
                )
                with forced(gemm):
                    for _ in range(3):  # unpacked, packed, from the cache
                        assert_close(OPS.linear(x, w, bias, False), want, **EXACT)
                    assert_close(OPS.linear(x[None], w, bias, True), want[None], **EXACT)
                    if rows:
                        assert_close(OPS.linear(x[0], w, bias, False), want[0], **EXACT)
            with forced(gemm):
                dx, dw, db = OPS.row_linear_backward(dy, x, w, True)
            for ours, truth in (
                (dx, dy.double() @ w.double()),
                (dw, dy.double().t() @ x.double()),
                (db, dy.double().sum(0)),
            ):
                assert_close(ours, truth.to(dtype), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_every_gemm_is_as_accurate_as_torch(gemm, dtype):
    if not can(gemm, dtype):
        pytest.skip("oneDNN has no arithmetic for this dtype on this machine")
    rows, k, n = 150, 192, 320
    x, w, b, dy = (
        torch.randn(*shape, dtype=dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))
    )
    big = truth_dtype(dtype)
    with forced(gemm):
        for _ in range(2):
            ours = OPS.linear(x, w, b, False)
        grads = OPS.row_linear_backward(dy, x, w, False)
    assert_as_accurate("y", ours, F.linear(x, w, b), F.linear(x.to(big), w.to(big), b.to(big)))
    assert_as_accurate("dx", grads[0], dy @ w, dy.to(big) @ w.to(big))
    assert_as_accurate("dw", grads[1], dy.t() @ x, dy.to(big).t() @ x.to(big))


@pytest.mark.skipif(not _C.has_library(Library.onednn), reason="this torch has no oneDNN")
def test_onednn_sums_float32_in_blocks_where_a_gradient_is_wanted():
    rows, k, n = 700, 1030, 2100  # more than one block of rows and of k, the last of each ragged
    x, w, b, dy = integers(rows, k), integers(n, k), integers(n), integers(rows, n)
    layouts = [
        (x, w),
        (x.t().contiguous().t(), w.t().contiguous().t()),
        (integers(rows, 2 * k)[:, ::2], integers(2 * n, k)[::2]),
    ]
    with forced((Library.onednn, False, False)):
        for x, w in layouts:
            for some in (x, x[:7]):  # few rows are left to at::mm
                assert_close(OPS.linear(some, w, b, True), F.linear(some, w, b), **EXACT)
            dx, dw = OPS.row_linear_backward(dy, x, w, False)
            assert_close(dx, dy @ w, **EXACT)
            assert_close(dw, dy.t() @ x, **EXACT)
        # With one sign only, errors grow with the sum.
        x, w, dy = (
            torch.rand(256, 4096),
            torch.rand(256, 4096),
            torch.rand(4096, 256),
        )
        y, dw = (
            OPS.linear(x, w, None, True),
            OPS.row_linear_backward(dy, w.t().contiguous(), None, False)[0],
        )
        at_once = OPS.linear(x, w, None, False)
    truth = F.linear(x.double(), w.double())
    assert_as_accurate("y", y, F.linear(x, w), truth)
    assert_as_accurate("dw", dw, dy.t() @ w.t(), dy.double().t() @ w.double().t())
    assert (y - truth).abs().max() < 0.7 * (at_once - truth).abs().max()


@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_what_is_not_finite_comes_through(gemm):
    x, w = torch.ones(3, 32), torch.ones(16, 32)
    x[0, 5], x[1, 6], w[7, 3] = torch.nan, torch.inf, -torch.inf
    with forced(gemm):
        for _ in range(3):
            assert_close(OPS.linear(x, w, None, False), F.linear(x, w), equal_nan=True, **EXACT)


def test_the_choice():
    """No machine packs with a gradient, or changes the GEMM of small, empty or double weights."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.zeros(512, 1024, dtype=dtype)
        for rows in (1, 16, 128, 4096):
            assert not _C.choose_gemm(weight, rows, False)[2]
        plain = (Library.aten, False, False)
        others = [
            (torch.zeros(16, 16, dtype=dtype), 128),
            (weight, 0),
            (weight[:0], 128),
            (weight.double(), 128),
        ]
        assert all(_C.choose_gemm(w, rows, True) == plain for w, rows in others)
