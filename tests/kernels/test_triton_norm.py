import pytest
import reference
import torch
from rules import assert_as_good_as_torch, strided, transposed

from tpkernels.kernels import heuristics, norm
from tpkernels.kernels.launch_config import Config

SHAPES = [(1, 1), (7, 64), (5, 3, 200), (90, 40), (33,)]
BLOCKS = [None, 32]  # whole rows in registers, or block by block


@pytest.fixture(params=BLOCKS, ids=["rows", "blocks"])
def blocks(request, monkeypatch):
    if request.param:
        config = Config(dict(BLOCK_M=4, BLOCK_N=request.param))
        for tunable in (norm.FORWARD, norm.BACKWARD):
            monkeypatch.setattr(tunable, "candidates", lambda features, itemsize: [config])


def make(shape, dtype, device, residual=True, weight=True, bias=True):
    def random(wanted, size):
        return torch.randn(size, dtype=dtype, device=device) if wanted else None

    return (
        random(True, shape),
        random(residual, shape),
        random(weight, shape[-1]),
        random(bias, shape[-1]),
    )


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(x, residual, weight, bias, rms, eps=1e-5):
    y, total, mean, rstd = norm.norm(x, residual, weight, bias, eps, rms)
    h = x if residual is None else x + residual
    exact = reference.norm(h.double(), None, *double(weight, bias), eps, rms)
    same = reference.norm(
        h, None, *(None if t is None else t.to(x.dtype) for t in (weight, bias)), eps, rms
    )
    assert_as_good_as_torch(y, same[0], exact[0])
    assert_as_good_as_torch(mean, same[2], exact[2])
    assert_as_good_as_torch(rstd, same[3], exact[3])
    if residual is None:
        assert total.shape == (0,) and total.dtype == x.dtype
    else:
        torch.testing.assert_close(total, h, atol=0, rtol=0)

    def gradients(h, weight, bias, grad, grad_sum):
        leaves = [t.detach().requires_grad_() for t in (h, weight, bias) if t is not None]
        rest = iter(leaves)
        y = reference.norm(
            next(rest), None, *(None if t is None else next(rest) for t in (weight, bias)), eps, rms
        )[0]
        grads = torch.autograd.grad(y, leaves, grad)
        return (grads[0] if grad_sum is None else grads[0] + grad_sum, *grads[1:])

    grad, grad_sum = torch.randn_like(h), None if residual is None else torch.randn_like(h)
    out = norm.norm_backward(
        grad, grad_sum, h, weight, mean, rstd, rms, weight is not None, bias is not None
    )
    exact = gradients(*double(h, weight, bias, grad, grad_sum))
    same = gradients(
        h, *(None if t is None else t.to(x.dtype) for t in (weight, bias)), grad, grad_sum
    )
    assert len(out) == len(exact)
    for mine, ours, true, like in zip(
        out, same, exact, [x, *(t for t in (weight, bias) if t is not None)], strict=True
    ):
        assert mine.dtype == like.dtype and mine.is_contiguous()
        assert_as_good_as_torch(mine, ours.to(like.dtype), true)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_shapes(shape, rms, blocks, device):
    check(*make(shape, torch.bfloat16, device, bias=not rms), rms)


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_dtypes(dtype, rms, blocks, device):
    check(*make((9, 100), dtype, device, bias=not rms), rms)


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize(
    "present",
    [(False, True, True), (True, False, False), (False, False, True), (False, True, False)],
    ids=str,
)
def test_without_residual_weight_or_bias(present, rms, device):
    check(*make((6, 50), torch.float32, device, *present), rms)


def test_more_rows_than_programs_take_at_once(monkeypatch, blocks, device):
    monkeypatch.setattr(heuristics, "NORM_MAX_SPLITS", 2)
    check(*make((41, 70), torch.float32, device), False)


def test_rows_longer_than_registers_hold(device):
    assert (
        norm.FORWARD(20000, 2).blocks["BLOCK_N"] < 20000
        and norm.BACKWARD(20000, 2).blocks["BLOCK_N"] < 20000
    )
    check(*make((1, 20000), torch.bfloat16, device, weight=False, bias=False), False)


@pytest.mark.parametrize(
    "tunable, width, itemsize",
    [
        *(
            (norm.FORWARD, width, itemsize)
            for width, itemsize in [(16384, 2), (16384, 4), (8192, 8)]
        ),
        *(
            (norm.BACKWARD, width, itemsize)
            for width, itemsize in [(8192, 2), (8192, 4), (4096, 8)]
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_widest_rows_that_registers_hold(tunable, width, itemsize):
    assert tunable(width, itemsize).blocks["BLOCK_N"] == width
    assert tunable(width + 1, itemsize).blocks["BLOCK_N"] <= width


def test_rows_as_wide_as_a_block_stay_in_registers(monkeypatch, device):
    monkeypatch.setattr(norm, "norm_long_kernel", None)
    monkeypatch.setattr(norm, "norm_backward_long_kernel", None)
    check(*make((2, 64), torch.float32, device), False)


@pytest.mark.parametrize("lay", [strided, transposed])
def test_any_strides(lay, blocks, device):
    x, residual, weight, bias = make((4, 3, 40), torch.float32, device)
    plain = norm.norm(x, residual, weight, bias, 1e-5, False)
    laid = norm.norm(lay(x), lay(residual), weight, bias, 1e-5, False)
    for a, b in zip(laid, plain, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    _, total, mean, rstd = plain
    grads = [
        norm.norm_backward(f(x), f(residual), f(total), weight, mean, rstd, False, True, True)
        for f in (lay, lambda t: t)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_broadcast_gradient(device):
    x, _, weight, bias = make((5, 30), torch.float32, device)
    _, _, mean, rstd = norm.norm(x, None, weight, bias, 1e-5, False)
    grad = torch.randn(30, device=device)
    a, b = (
        norm.norm_backward(g, None, x, weight, mean, rstd, False, True, True)
        for g in (grad.expand(5, 30), grad.repeat(5, 1))
    )
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, atol=0, rtol=0)


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_parameters_of_another_dtype(rms, device):
    x, residual, weight, bias = make((9, 48), torch.bfloat16, device, bias=not rms)
    check(x, residual, weight.float(), None if bias is None else bias.float(), rms)


def test_statistics_do_not_cancel(blocks, device):
    """A mean far from zero: E[x^2] - E[x]^2 would leave nothing of the variance."""
    x = torch.randn(3, 200, device=device) + 30000
    y, _, _, rstd = norm.norm(x, None, None, None, 1e-5, False)
    exact = reference.norm(x.double(), None, None, None, 1e-5, False)
    torch.testing.assert_close(rstd.double(), exact[3], atol=0, rtol=1e-4)
    torch.testing.assert_close(y.double(), exact[0], atol=1e-2, rtol=0)


def test_constant_rows_are_exact(blocks, device):
    """All deviations are zero: y is the bias, and LayerNorm's input gets no gradient."""
    x, weight, bias = (
        torch.full((4, 64), 3.0, device=device),
        torch.ones(64, device=device),
        torch.arange(64.0, device=device),
    )
    y, _, mean, rstd = norm.norm(x, None, weight, bias, 0.25, False)
    torch.testing.assert_close(y, bias.expand(4, 64), atol=0, rtol=0)
    torch.testing.assert_close(mean, x[:, 0], atol=0, rtol=0)
    torch.testing.assert_close(rstd, torch.full((4,), 2.0, device=device), atol=1e-6, rtol=0)
    grad = torch.ones(4, 64, device=device)
    dx, d_weight, d_bias = norm.norm_backward(grad, grad, x, weight, mean, rstd, False, True, True)
    torch.testing.assert_close(dx, grad, atol=0, rtol=0)
    torch.testing.assert_close(d_weight, torch.zeros(64, device=device), atol=0, rtol=0)
    torch.testing.assert_close(d_bias, torch.full((64,), 4.0, device=device), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
def test_empty(shape, rms, device):
    x, residual, weight, bias = make(shape, torch.bfloat16, device)
    y, total, mean, rstd = norm.norm(x, residual, weight, bias, 1e-5, rms)
    rows = x.shape[:-1].numel()
    assert (
        y.shape == total.shape == shape
        and mean.shape == (0 if rms else rows,)
        and rstd.shape == (rows,)
    )
    dx, d_weight, d_bias = norm.norm_backward(y, None, total, weight, mean, rstd, rms, True, True)
    assert (
        dx.shape == shape
        and not d_weight.any()
        and not d_bias.any()
        and d_weight.shape == d_bias.shape == shape[-1:]
    )


def test_nan_stays_in_its_row(blocks, device):
    x = torch.randn(5, 40, device=device)
    x[2, 7] = torch.nan
    y, _, mean, rstd = norm.norm(x, None, None, None, 1e-5, False)
    assert (
        y.isnan().all(1).tolist()
        == y.isnan().any(1).tolist()
        == mean.isnan().tolist()
        == [False, False, True, False, False]
    )
    dx = norm.norm_backward(torch.ones_like(x), None, x, None, mean, rstd, False, False, False)[0]
    assert (
        dx.isnan().all(1).tolist()
        == dx.isnan().any(1).tolist()
        == [False, False, True, False, False]
    )
