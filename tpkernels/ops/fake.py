"""Registration of the ops' fake kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def register_fake(op: str) -> Callable[[Callable], Callable]:
    """Return a decorator that registers a fake kernel, which computes shapes alone, for an op.

    Fake tensors do not come to the checks of csrc/checks. Their shapes and dtypes meet those when
    the traced program runs, but a trace over several devices could never run: it is refused.

    Args:
        op: name without its namespace.
    """

    def decorate(kernel: Callable) -> Callable:
        signature = inspect.signature(kernel)

        @functools.wraps(kernel)
        def checked(*args, **options):
            check_one_device(signature.bind(*args, **options).arguments)
            return kernel(*args, **options)

        torch.library.register_fake(f"tpkernels::{op}", checked)
        return checked

    return decorate


def check_one_device(arguments: dict[str, object]) -> None:
    """Raise ValueError unless all tensors among the arguments are on one device."""
    tensors = list(_named_tensors(arguments))
    for name, tensor in tensors[1:]:
        first_name, first = tensors[0]
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first_name} is on {first.device}: "
                "move one of them"
            )


def _named_tensors(arguments: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        yield from ((name, v) for v in values if isinstance(v, Tensor))
