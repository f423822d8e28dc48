"""Activations by the CPU kernels and in ATen calls."""

import pytest
import torch
from cpu_ops import (
    GATED,
    OPS,
    activate,
    activations,
    bias_act,
    cases,
    check,
    detached,
    dtypes,
    gated_act,
    make,
    with_grads,
)


@dtypes
@cases
@activations
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_bias_act(ops, activation, with_bias, leading, columns, layout, dtype):
    width = columns * (2 if activation in GATED else 1)
    x = make(*leading, width, dtype=dtype, layout=layout, grad=True)
    bias = make(width, dtype=dtype, grad=True) if with_bias else None
    grad = make(*leading, columns, dtype=dtype, layout=layout)
    check(
        [ops.bias_act(*detached(x, bias), activation)],
        lambda *a: [bias_act(*a)],
        (x, bias, activation),
    )
    grads = ops.bias_act_backward(grad, *detached(x, bias), activation, with_bias)
    check(grads, with_grads(bias_act), (x, bias, activation, grad))


@dtypes
@cases
@pytest.mark.parametrize("activation", list(GATED))
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_gated_act(ops, activation, with_bias, leading, columns, layout, dtype):
    gate, up = (make(*leading, columns, dtype=dtype, layout=layout, grad=True) for _ in range(2))
    biases = [make(columns, dtype=dtype, grad=True) if with_bias else None for _ in range(2)]
    grad = make(*leading, columns, dtype=dtype, layout=layout)
    check(
        [ops.gated_act(*detached(gate, up, *biases), activation)],
        lambda *a: [gated_act(*a)],
        (gate, up, *biases, activation),
    )
    grads = ops.gated_act_backward(grad, *detached(gate, up, *biases), activation, with_bias)
    check(grads, with_grads(gated_act), (gate, up, *biases, activation, grad))


@dtypes
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_bias_act_exact(ops, activation, dtype):
    x, bias, grad = (torch.randint(-4, 5, shape).to(dtype) for shape in [(5, 33), (33,), (5, 33)])
    x, bias = x.requires_grad_(), bias.requires_grad_()
    torch.testing.assert_close(
        ops.bias_act(*detached(x, bias), activation),
        bias_act(*detached(x, bias), activation),
        rtol=0,
        atol=0,
    )
    grads = ops.bias_act_backward(grad, *detached(x, bias), activation, True)
    for ours, torchs in zip(grads, with_grads(bias_act)(x, bias, activation, grad), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0)


def test_activations_of_large_input():
    x = torch.tensor(
        [-torch.inf, -1e4, -90.0, -12.0, -0.0, 0.0, 12.0, 90.0, 1e4, torch.inf, torch.nan]
    )
    for activation in ("relu", "relu2", "gelu", "gelu_tanh", "silu"):
        out = OPS.bias_act(x, None, activation)
        # torch's own kernels, where they are taken, give NaN for gelu of an infinity on some
        # instruction sets.
        kept = (
            slice(1, None) if torch.backends.cpu.get_cpu_capability() == "AVX512" else x.isfinite()
        )
        torch.testing.assert_close(
            out[kept].double(),
            activate(x.double(), activation)[kept],
            atol=1e-6,
            rtol=1e-6,
            equal_nan=True,
        )
        (grad,) = OPS.bias_act_backward(torch.ones(8), x[1:-2].clone(), None, activation, False)
        assert grad.isfinite().all()


@activations
@pytest.mark.parametrize("keep", [False, True])
def test_column_linear_act(ops, activation, keep):
    x, weight, bias = make(2, 3, 16), make(34, 16), make(34)
    out, linear = ops.column_linear_act(x, weight, bias, activation, keep)
    check([out], lambda x, w, b, a: [bias_act(x @ w.t(), b, a)], (x, weight, bias, activation))
    torch.testing.assert_close(linear, x @ weight.t() if keep else torch.empty(0))


def test_unknown_activation(ops):
    with pytest.raises(ValueError, match="tanh"):
        ops.bias_act(torch.ones(3), None, "tanh")
