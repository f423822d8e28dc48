"""Calls of ops without the checks of their arguments."""

from collections.abc import Callable

import torch


class Unchecked:
    """A library of ops on the CPU, such as torch.ops.tpkernels, without csrc/checks.

    A malformed call then throws inside the op, in the middle of it.
    """

    def __init__(self, ops):
        self._ops = ops

    def __getattr__(self, name: str) -> Callable:
        op = getattr(self._ops, name).default
        backend = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return lambda *args, **options: op.redispatch(backend, *args, **options)
