"""RMSNorm and LayerNorm by the CPU kernels and in ATen calls."""

import math

import pytest
import torch
from cpu_ops import cases, check, detached, dtypes, make, norm


@dtypes
@cases
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("with_residual,with_weight", [(False, False), (True, True), (False, True)])
def test_norm(ops, rms, with_residual, with_weight, leading, columns, layout, dtype):
    x = make(*leading, columns, dtype=dtype, layout=layout, grad=True)
    residual = make(*leading, columns, dtype=dtype) if with_residual else None
    weight = make(columns, dtype=dtype, grad=True) if with_weight else None
    bias = make(columns, dtype=dtype, grad=True) if with_weight and not rms else None
    eps = 1e-5
    y, total, mean, rstd = ops.norm(*detached(x, residual, weight, bias), eps, rms)
    h = x.detach() if residual is None else (x + residual).detach()
    assert torch.equal(total, h if with_residual else h.new_empty(0))
    rows = math.prod(leading)
    assert rstd.shape == (rows,) and mean.shape == ((0,) if rms else (rows,))
    statistic = h.double().reshape(rows, columns)
    if not rms:
        means = statistic.mean(1)  # NaN where there are no columns
        torch.testing.assert_close(mean.double(), means, atol=1e-6, rtol=1e-5, equal_nan=True)
        statistic = statistic - means[:, None]
    expected = (statistic.square().mean(1) + eps).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, atol=1e-6, rtol=1e-4, equal_nan=True)
    check([y], lambda *a: [norm(*a)[0]], (h, None, weight, bias, eps, rms))
    if columns < 2:  # LayerNorm of one column is constant: its gradient is rounding
        return
    grad, grad_sum = (
        make(*leading, columns, dtype=dtype, layout=layout),
        make(*leading, columns, dtype=dtype),
    )
    args = (
        grad,
        grad_sum if with_residual else None,
        h,
        weight.detach() if with_weight else None,
        mean,
        rstd,
    )
    grads = ops.norm_backward(*args, rms, with_weight, bias is not None)

    def backward(h, weight, bias, grad, grad_sum):
        leaves = [t for t in (h, weight, bias) if t is not None]
        out, _ = norm(h, None, weight, bias, eps, rms)
        dh, *rest = torch.autograd.grad(out, leaves, grad)
        return [dh + grad_sum if with_residual else dh, *rest]

    check(grads, backward, (h.clone().requires_grad_(), weight, bias, grad, grad_sum))


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_norm_keeps_float_weights(ops, rms):
    x, weight, grad = make(4, 33, dtype=torch.bfloat16), make(33), make(4, 33, dtype=torch.bfloat16)
    y, _, mean, rstd = ops.norm(x, None, weight, None, 1e-5, rms)
    expected, _ = norm(x.float(), None, weight, None, 1e-5, rms)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16())
    dx, dweight = ops.norm_backward(grad, None, x, weight, mean, rstd, rms, True, False)
    assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32
