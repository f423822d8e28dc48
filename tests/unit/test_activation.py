"""Activations with bias, whole and gated, as differentiable functions."""

import itertools

import pytest
import reference
import torch
from helpers import assert_as_accurate, grads_of, truth_dtype
from torch.testing import assert_close

import tpkernels.functional as tpf

SHAPES = [(7, 33), (2, 3, 17), (33,), (0, 8), (5, 1)]


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_act(activation, biases, shape):
    torch.manual_seed(0)
    none = [] if biases else [None, None]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(*s).to(dtype) for s in (shape, shape, *[shape[-1:]] * 2 * biases)]
        dy = torch.randn(*shape).to(dtype)
        ours = grads_of(lambda g, u, *b: tpf.gated_act(g, u, activation, *b), inputs, dy)
        references = [
            grads_of(
                lambda *a: reference.gated_act(*a, *none, activation),
                [t.to(d) for t in inputs],
                dy.to(d),
            )
            for d in (dtype, truth_dtype(dtype))
        ]
        for name, *values in zip(
            ("y", "dgate", "dup", "dgate_bias", "dup_bias"), ours, *references, strict=False
        ):
            assert_as_accurate(name, *values)


@pytest.mark.parametrize(
    "wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(4), n)], ids=str
)
def test_gated_act_computes_the_gradients_asked_for(wanted):
    """Some of gate, up and their biases are frozen, and get none."""
    values = [torch.randn(*shape) for shape in ((3, 4), (3, 4), (4,), (4,))]
    grads = []
    for function in (
        lambda gate, up, *biases: tpf.gated_act(gate, up, "swiglu", *biases),
        lambda *leaves: reference.gated_act(*leaves, "swiglu"),
    ):
        leaves = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(values)]
        function(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert [grad is not None for grad in grads[0]] == [i in wanted for i in range(4)]
    assert_close(*([grad for grad in of if grad is not None] for of in grads))


def test_bias_act_promotes_as_addition_does():
    x, bias, dy = (
        torch.randn(5, 6).bfloat16().requires_grad_(),
        torch.randn(6, requires_grad=True),
        torch.randn(5, 6),
    )
    for activation in ("gelu", None):
        y = tpf.bias_act(x, bias, activation)
        assert y.dtype == torch.float32
        x.grad = bias.grad = None
        y.backward(dy)
        grads = x.grad, bias.grad
        x.grad = bias.grad = None
        want = reference.bias_act(x, bias, activation)
        want.backward(dy)
        assert_close([y, *grads], [want, x.grad, bias.grad])


@pytest.mark.parametrize(
    "activation", ["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]
)
def test_bias_act_and_its_biases_gradient(activation):
    torch.manual_seed(0)
    for shape, dtype in itertools.product(
        [(4, 34), (2, 3, 16), (0, 8), (6,)], (torch.float32, torch.bfloat16)
    ):
        inputs = [torch.randn(*shape).to(dtype), torch.randn(shape[-1]).to(dtype)]
        dy = torch.randn(
            *shape[:-1], shape[-1] // (2 if activation in ("swiglu", "geglu") else 1)
        ).to(dtype)
        ours = grads_of(lambda x, b: tpf.bias_act(x, b, activation), inputs, dy)
        references = [
            grads_of(
                lambda x, b: reference.bias_act(x, b, activation),
                [t.to(d) for t in inputs],
                dy.to(d),
            )
            for d in (dtype, truth_dtype(dtype))
        ]
        for name, *values in zip(("y", "dx", "db"), ours, *references, strict=True):
            assert_as_accurate(f"{name} {shape}", *values)
