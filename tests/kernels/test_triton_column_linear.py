import os

import pytest
import reference
import torch
from rules import assert_as_good_as_torch, strided
from triton._C.libtriton import ir
from triton.runtime import interpreter

from tpkernels.kernels.column_linear import column_linear_act

INTERPRETER = interpreter.interpreter_builder if os.environ.get("TRITON_INTERPRET") == "1" else None


def make(shape, dtype, device, gated=False):
    rows, features, inner = shape
    rand = lambda *size: torch.randn(*size, dtype=dtype, device=device)  # noqa: E731
    return (
        rand(rows, inner),
        rand(features * (2 if gated else 1), inner),
        rand(features * (2 if gated else 1)),
    )


def expected(x, w, bias, act):
    product = x @ w.t()
    return reference.bias_act(product, bias, act), product


def check(act, x, w, bias):
    doubles = [None if t is None else t.double() for t in (x, w, bias)]
    same, exact = expected(x, w, bias, act), expected(*doubles, act)
    out, pre = column_linear_act(x, w, bias, act, True)
    assert_as_good_as_torch(out, same[0], exact[0])
    assert_as_good_as_torch(pre, same[1], exact[1])
    alone, nothing = column_linear_act(x, w, bias, act, False)
    torch.testing.assert_close(alone, out, atol=0, rtol=0)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("act", ["relu", "relu2", "silu", "gelu_tanh", "gelu", "swiglu", "geglu"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_activations(act, dtype, device):
    check(act, *make((33, 40, 70), dtype, device, act in ("swiglu", "geglu")))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (129, 130, 5), (1, 300, 129), (5, 7, 64), (1200, 128, 16)],
    ids=str,
)
@pytest.mark.parametrize("act", ["gelu_tanh", "swiglu"])
def test_shapes(act, shape, device):
    x, w, bias = make(shape, torch.bfloat16, device, act == "swiglu")
    check(act, x, w, bias)
    check(act, x, w, None)


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4, 0)], ids=str)
def test_nothing_to_multiply(shape, device):
    check("relu", *make(shape, torch.float32, device))


def test_strides_and_leading_dimensions(device):
    x, w, bias = make((12, 20, 16), torch.float32, device)
    out = column_linear_act(x, w, bias, "gelu", False)[0]
    assert column_linear_act(x.view(3, 4, 16), w, bias, "gelu", True)[1].shape == (3, 4, 20)
    for other in (
        column_linear_act(strided(x), strided(w), bias, "gelu", False),
        column_linear_act(x.t().contiguous().t(), w, bias, "gelu", False),
    ):
        torch.testing.assert_close(other[0], out, atol=0, rtol=0)


@pytest.mark.parametrize("act", ["relu", "relu2"])
def test_integers_are_exact(act, device):
    x, w, bias = (
        torch.randint(-3, 4, t.shape, device=device).float()
        for t in make((70, 130, 60), torch.float32, device)
    )
    out, pre = column_linear_act(x, w, bias, act, True)
    same, product = expected(x, w, bias, act)
    torch.testing.assert_close(out, same, atol=0, rtol=0)
    torch.testing.assert_close(pre, product, atol=0, rtol=0)


@pytest.mark.skipif(INTERPRETER is None, reason="on a GPU the rule for float32 results shows it")
@pytest.mark.parametrize("act", ["gelu", "swiglu"])
def test_float32_is_multiplied_in_float32(act, device, monkeypatch):
    """The interpreter multiplies exactly whatever the kernel asks for."""
    precisions, builder = [], type(INTERPRETER)
    create_dot = builder.create_dot

    def recorded(self, a, b, total, precision, *rest):
        precisions.append(precision)
        return create_dot(self, a, b, total, precision, *rest)

    monkeypatch.setattr(builder, "create_dot", recorded)
    column_linear_act(*make((5, 7, 9), torch.float32, device, act == "swiglu"), act, False)
    assert precisions and set(precisions) == {ir.INPUT_PRECISION.IEEE}
