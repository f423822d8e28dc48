"""RMSNorm and LayerNorm as differentiable functions and modules."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, truth_dtype
from torch import nn
from torch.testing import assert_close

import tpkernels.functional as tpf
from tpkernels.nn import LayerNorm, RMSNorm


@pytest.mark.parametrize("rms", [True, False], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "with_residual,used", [(False, "both"), (True, "both"), (True, "norm"), (True, "sum")]
)
def test_norm(rms, with_residual, used):
    """Results and gradients, also where one of the two results is not used."""
    torch.manual_seed(0)
    for shape, affine, dtype in itertools.product(
        [(7, 33), (2, 3, 17), (33,), (0, 8)], (False, True), (torch.float32, torch.bfloat16)
    ):
        x, residual = (
            torch.randn(*shape).to(dtype),
            torch.randn(*shape).to(dtype) if with_residual else None,
        )
        weight, bias = (
            torch.randn(shape[-1]).to(dtype) if there else None
            for there in (affine, affine and not rms)
        )
        dys = [torch.randn(*shape).to(dtype) for _ in range(2)]

        def run(function, d):
            leaves = [
                None if t is None else t.detach().to(d).requires_grad_()
                for t in (x, weight, bias, residual)  # noqa: B023
            ]
            out = function(*leaves)
            out = out if with_residual else (out,)
            kept = {"both": (0, 1), "norm": (0,), "sum": (1,)}[used][: len(out)]
            grads = [dys[i].to(d) for i in kept]  # noqa: B023
            torch.autograd.backward([out[i] for i in kept], grads)
            return [*out, *(t.grad for t in leaves if t is not None)]

        def ours(x, weight, bias, residual):
            args = (weight,) if rms else (weight, bias)
            return (tpf.rms_norm if rms else tpf.layer_norm)(x, *args, eps=1e-5, residual=residual)

        results = (
            run(ours, dtype),
            *(run(lambda *a: stock_norm(*a, rms), d) for d in (dtype, truth_dtype(dtype))),
        )
        for i, values in enumerate(zip(*results, strict=True)):
            none = [v is None or not v.any() for v in values]
            # An unused result gives its weight no gradient.
            assert none[0] == none[2] or values[2].numel() < 2, (
                i,
                shape,
            )
            if not none[2]:
                assert values[0].dtype == dtype
                assert_as_accurate(f"result {i} {shape}", *(v.detach() for v in values))


LEAVES = ("x", "weight", "bias", "residual")


@pytest.mark.parametrize("rms", [True, False], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "wanted", [w for n in (1, 2, 3) for w in itertools.combinations(LEAVES, n)], ids="-".join
)
def test_gradients_of_some_of_the_inputs(wanted, rms):
    """The others are frozen, and get none."""
    if rms and "bias" in wanted:
        wanted = tuple(name for name in wanted if name != "bias") or ("weight",)
    for residual in (False, True) if "residual" not in wanted else (True,):
        values = dict(x=torch.randn(5, 24), weight=torch.randn(24))
        values |= dict(residual=torch.randn(5, 24)) if residual else {}
        values |= {} if rms else dict(bias=torch.randn(24))
        dy, grads = torch.randn(5, 24), []
        for function in (tpf.rms_norm if rms else tpf.layer_norm, stock_norm):
            given = {k: v.clone().requires_grad_(k in wanted) for k, v in values.items()}
            if function is stock_norm:
                out = function(*map(given.get, LEAVES), rms)
            else:
                rest = {k: v for k, v in given.items() if k != "x"}
                out = function(given["x"], eps=1e-5, **rest)
            (out[0] if residual else out).backward(dy)
            grads.append({k: v.grad for k, v in given.items() if k in wanted})
            assert all(v.grad is None for k, v in given.items() if k not in wanted)
        assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_norm_of_mixed_dtypes():
    x, residual, weight = (
        torch.randn(3, 8).bfloat16().requires_grad_(),
        torch.randn(3, 8),
        torch.randn(8, requires_grad=True),
    )
    y, total = tpf.rms_norm(x, weight, residual=residual)
    assert y.dtype == total.dtype == torch.float32
    assert_close([y, total], list(stock_norm(x.float(), weight, None, residual, True)))
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert tpf.rms_norm(x, weight).dtype == torch.bfloat16


def test_norm_modules():
    x, residual = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    for ours, stock in (
        (RMSNorm(12), nn.RMSNorm(12)),
        (RMSNorm(12, 0.1, elementwise_affine=False), nn.RMSNorm(12, 0.1, elementwise_affine=False)),
        (LayerNorm(12), nn.LayerNorm(12)),
        (LayerNorm(12, 0.1, bias=False), nn.LayerNorm(12, 0.1, bias=False)),
        (LayerNorm(12, elementwise_affine=False), nn.LayerNorm(12, elementwise_affine=False)),
    ):
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.copy_(torch.randn(12))
        ours.load_state_dict(stock.state_dict())
        assert_close(ours(x), stock(x))
        y, total = ours(x, residual)
        assert_close([y, total], [stock(x + residual), x + residual])
    with pytest.raises(ValueError, match="normalized_shape must be an int"):
        RMSNorm((3, 4))


def stock_norm(x, weight, bias, residual, rms):
    h = x if residual is None else x + residual
    y = (
        F.rms_norm(h, h.shape[-1:], weight, 1e-5)
        if rms
        else F.layer_norm(h, h.shape[-1:], weight, bias, 1e-5)
    )
    return y if residual is None else (y, h)
