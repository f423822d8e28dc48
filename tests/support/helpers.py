"""Comparisons that several test files make."""

import torch
import torch.distributed as dist

import tpkernels as tpk


def assert_same_grads(stock, sharded, tolerance=2e-5):
    """Compare every gradient of `sharded`, gathered, with the stock model's.

    The tolerance is relative to the parameter's largest gradient. It is relative to the model's
    where the parameter's is zero but for rounding: softmax does not see the bias of keys without
    rotary embedding.
    """
    grads = tpk.unsharded_gradients(sharded)
    largest = max(p.grad.abs().max() for p in stock.parameters() if p.grad is not None)
    for name, parameter in stock.named_parameters():
        if parameter.grad is None:
            assert name not in grads or not grads[name].any(), (
                f"{name} has a gradient that the stock model's has not"
            )
            continue
        error = (grads[name] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(
            1e-3 * largest
        )
        assert error < tolerance, f"{name}: {error:.1e}"


def count_all_reduces(run):
    """Return the number of all-reduces that torch's profiler counts, and run()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return sum(
        event.count for event in profile.key_averages() if event.key == "c10d::allreduce_"
    ), result


def truth_dtype(dtype):
    """Return the dtype of the truth that results of `dtype` are compared with."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def assert_as_accurate(name, ours, same_dtype, truth):
    """Require max|ours - truth| < 2 max|torch in the same dtype - truth| + 1e-6."""
    assert ours.shape == truth.shape, name
    if truth.numel():
        error = (ours - truth).abs().max()
        bound = 2 * (same_dtype - truth).abs().max() + 1e-6 * truth.abs().max().clamp_min(1)
        assert error < bound, f"{name} {ours.dtype}: {error:.2e} >= {bound:.2e}"


EXACT = dict(atol=0, rtol=0)


def grads_of(function, inputs, dy=None):
    """Return function(*inputs) and the inputs' gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    (out if dy is None else (out * dy)).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def turned(x, cos, sin, interleaved):
    """Rotate pair by pair, as complex numbers times e^(i angle)."""
    half = cos.shape[-1]
    tables = torch.complex(*(t.to(torch.float64) for t in (cos, sin)))
    tables = tables if tables.dim() == 2 else tables[:, None]
    head = x[..., : 2 * half].to(torch.float64)
    pairs = (
        head.unflatten(-1, (half, 2))
        if interleaved
        else head.unflatten(-1, (2, half)).transpose(-1, -2)
    )
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * tables)
    product = product if interleaved else product.transpose(-1, -2)
    return torch.cat([product.flatten(-2), x[..., 2 * half :].to(torch.float64)], -1)


def everyone(tensor):
    """Every rank's copy."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return copies
