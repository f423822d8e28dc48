"""What several test files compare."""

import torch

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
            assert name not in grads or not grads[name].any(), f"{name} has a gradient that the unsplit model's has not"
            continue
        error = (grads[name] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(1e-3 * largest)
        assert error < tolerance, f"{name}: {error:.1e}"


def count_all_reduces(run):
    """Counted from outside, by torch's profiler, and what `run` returned."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return sum(event.count for event in profile.key_averages() if event.key == "c10d::allreduce_"), result
