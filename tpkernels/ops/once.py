"""torch's once_differentiable, without its cost where nobody differentiates gradients."""

import functools

import torch
from torch.autograd.function import once_differentiable as _once_differentiable


def once_differentiable(backward):
    """Decorate a Function's backward whose gradients cannot be differentiated again.

    Doing so raises RuntimeError. torch's own decorator costs 3 us a backward for its no_grad, so
    it is used only where a graph of the gradients is asked for.
    """
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx, *grads):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return choose
