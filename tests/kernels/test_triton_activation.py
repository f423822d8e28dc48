import pytest
import reference
import torch
from rules import assert_as_good_as_torch, strided, transposed

from tpkernels.kernels import activation
from tpkernels.kernels.activation import bias_act, bias_act_backward, gated_act, gated_act_backward

PLAIN, GATED = ["relu", "relu2", "silu", "gelu_tanh", "gelu"], ["swiglu", "geglu"]
ACTIVATIONS = PLAIN + GATED


def make(act, shape, dtype, device, bias=True):
    """Return gradient, input and bias for outputs of `shape`; gated inputs are [..., 2 N]."""
    grad = torch.randn(shape, dtype=dtype, device=device)
    x = torch.randn(*shape[:-1], shape[-1] * (2 if act in GATED else 1), dtype=dtype, device=device)
    return grad, x, torch.randn(x.shape[-1], dtype=dtype, device=device) if bias else None


def gradients(grad, x, bias, act):
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    return torch.autograd.grad(
        reference.bias_act(leaves[0], leaves[1] if bias is not None else None, act), leaves, grad
    )


def check(act, grad, x, bias):
    doubles = [None if t is None else t.double() for t in (grad, x, bias)]
    out = bias_act(x, bias, act)
    assert_as_good_as_torch(
        out, reference.bias_act(x, bias, act), reference.bias_act(*doubles[1:], act)
    )
    grads = bias_act_backward(grad, x, bias, act, bias is not None)
    same, exact = gradients(grad, x, bias, act), gradients(*doubles, act)
    for mine, ours, true in zip(grads, same, exact, strict=True):
        assert_as_good_as_torch(mine, ours, true)
    if act in GATED:  # the same from separate halves, exactly
        halves = [*x.chunk(2, -1), *(bias.chunk(2) if bias is not None else (None, None))]
        torch.testing.assert_close(gated_act(*halves, act), out, atol=0, rtol=0)
        d_gate, d_up, *d_bias = gated_act_backward(grad, *halves, act, bias is not None)
        torch.testing.assert_close(torch.cat([d_gate, d_up], -1), grads[0], atol=0, rtol=0)
        if bias is not None:
            torch.testing.assert_close(torch.cat(d_bias), grads[1], atol=0, rtol=0)
            assert d_bias[0].untyped_storage().data_ptr() != d_bias[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_dtypes(act, bias, dtype, device):
    check(act, *make(act, (9, 70), dtype, device, bias))


@pytest.mark.parametrize("act", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (33,), (2, 3, 5), (150, 40), (150, 64), (20, 600)], ids=str
)
def test_shapes(act, shape, device):
    check(act, *make(act, shape, torch.bfloat16, device))


@pytest.mark.parametrize("act", ["gelu", "geglu"])
@pytest.mark.parametrize("lay", [strided, transposed])
def test_any_strides(act, lay, device):
    grad, x, bias = make(act, (4, 3, 20), torch.float32, device)
    torch.testing.assert_close(bias_act(lay(x), bias, act), bias_act(x, bias, act), atol=0, rtol=0)
    pairs = zip(
        bias_act_backward(lay(grad), lay(x), bias, act, True),
        bias_act_backward(grad, x, bias, act, True),
        strict=True,
    )
    for mine, want in pairs:
        torch.testing.assert_close(mine, want, atol=0, rtol=0)


@pytest.mark.parametrize("act", ["relu", "relu2"])
def test_integers_are_exact(act, device):
    x, grad = (torch.randint(-4, 5, (40, 300), device=device).float() for _ in range(2))
    bias = torch.arange(300.0, device=device) % 7 - 3
    torch.testing.assert_close(
        bias_act(x, bias, act), reference.bias_act(x, bias, act), atol=0, rtol=0
    )
    slope = (x + bias > 0) * (1 if act == "relu" else 2 * (x + bias))
    dx, d_bias = bias_act_backward(grad, x, bias, act, True)
    torch.testing.assert_close(dx, grad * slope, atol=0, rtol=0)
    torch.testing.assert_close(d_bias, (grad * slope).sum(0), atol=0, rtol=0)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_gradient_of_another_dtype_and_without_bias(act, device):
    grad, x, bias = make(act, (70, 20), torch.bfloat16, device)
    assert bias_act_backward(grad, x, bias.float(), act, True)[1].dtype == torch.float32
    assert len(bias_act_backward(grad, x, bias, act, False)) == 1
    without, zero = (
        bias_act_backward(grad, x, b, act, True) for b in (None, torch.zeros_like(bias))
    )
    for mine, want in zip(without, zero, strict=True):
        torch.testing.assert_close(mine, want, atol=0, rtol=0)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_in_its_element(act, device):
    _, x, bias = make(act, (3, 10), torch.float32, device)
    x[1, 4] = torch.nan
    assert bias_act(x, bias, act).isnan().nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_empty(act, shape, device):
    grad, x, bias = make(act, shape, torch.bfloat16, device)
    assert bias_act(x, bias, act).shape == shape
    dx, d_bias = bias_act_backward(grad, x, bias, act, True)
    assert dx.shape == x.shape and d_bias.shape == bias.shape and not d_bias.any()
    if act in GATED:
        halves = [*x.chunk(2, -1), *bias.chunk(2)]
        assert gated_act(*halves, act).shape == shape
        assert [tuple(t.shape) for t in gated_act_backward(grad, *halves, act, True)] == [
            shape,
            shape,
            shape[-1:],
            shape[-1:],
        ]


def test_launch_configurations_agree(monkeypatch, device):
    grad, x, bias = make("swiglu", (70, 40), torch.float32, device)
    want = bias_act(x, bias, "swiglu"), bias_act_backward(grad, x, bias, "swiglu", False)[0]
    for config in activation.FORWARD.candidates(64, 4):
        for tunable in (activation.FORWARD, activation.BACKWARD):
            monkeypatch.setattr(
                tunable, "candidates", lambda features, itemsize, config=config: [config]
            )
        torch.testing.assert_close(bias_act(x, bias, "swiglu"), want[0], atol=0, rtol=0)
        torch.testing.assert_close(
            bias_act_backward(grad, x, bias, "swiglu", False)[0], want[1], atol=0, rtol=0
        )
