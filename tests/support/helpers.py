"""What several test files compare."""

import torch
import torch.distributed as dist

import tpkernels as tpk


def assert_same_grads(stock, split, tolerance=2e-5):
    """Every gradient of `split`, gathered, against the unsplit model's, relative to the parameter's largest.

    A parameter whose gradient is zero but for rounding (the bias of keys without rotary embedding, which softmax does not see) is
    held against the model's largest.
    """
    grads = tpk.unsharded_gradients(split)
    largest = max(p.grad.abs().max() for p in stock.parameters() if p.grad is not None)
    for name, parameter in stock.named_parameters():
        if parameter.grad is None:
            assert name not in grads or not grads[name].any(), (
                f"{name} has a gradient that the unsplit model's has not"
            )
            continue
        error = (grads[name] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(
            1e-3 * largest
        )
        assert error < tolerance, f"{name}: {error:.1e}"


def count_all_reduces(run):
    """Counted from outside, by torch's profiler, and what `run` returned."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return sum(
        event.count for event in profile.key_averages() if event.key == "c10d::allreduce_"
    ), result


def wide(dtype):
    """What the results of `dtype` are judged by."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def assert_as_accurate(name, ours, twin, truth):
    """max|ours - truth| < 2 max|the twin in the same dtype - truth| + 1e-6"""
    assert ours.shape == truth.shape, name
    if truth.numel():
        error, bound = (
            (ours - truth).abs().max(),
            2 * (twin - truth).abs().max() + 1e-6 * truth.abs().max().clamp_min(1),
        )
        assert error < bound, (
            f"{name} {ours.dtype} on {dist.get_world_size() if dist.is_initialized() else 1}: {error:.2e} >= {bound:.2e}"
        )


EXACT = dict(atol=0, rtol=0)


def grads_of(function, inputs, dy=None):
    """function's outputs and the gradients of those inputs that are floating-point tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    (out if dy is None else (out * dy)).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def turned(x, cos, sin, interleaved):
    """Pair by pair, as complex numbers times e^(i angle)."""
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
