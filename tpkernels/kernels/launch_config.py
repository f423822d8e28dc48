"""Launch configurations of kernels that can be tuned. This file does not import Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """A kernel's block sizes and its launch options.

    Example:
        >>> Config(dict(BLOCK_M=8, BLOCK_N=512), num_warps=4).options(EPS=1e-6)
        {'EPS': 1e-06, 'BLOCK_M': 8, 'BLOCK_N': 512, 'num_warps': 4, 'num_stages': 2}
    """

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self, **constants: object) -> dict[str, Any]:
        """Return a launch's keyword arguments: the kernel's `constants`, block sizes, options."""
        return dict(constants, **self.blocks, num_warps=self.num_warps, num_stages=self.num_stages)


class Tunable:
    """A kernel whose launch configuration can be measured.

    It uses the first candidate until `tuning.tune` or `tuning.load` has chosen another.

    The choice depends on the kernel, the number of features (rounded up to a power of two) and
    the element size. Ranks that compute the same result share all three, so that they never
    differ in the last bits. Nothing is measured while a model runs.

    Args:
        name: key of the kernel in saved tables.
        candidates: (features, itemsize) -> configurations, best guess first.
        sample: (features, dtype, device) -> a call that launches the kernel, for `tuning.tune`.
    """

    known: dict[str, Tunable] = {}  # noqa: RUF012  every Tunable, by name

    def __init__(
        self,
        name: str,
        candidates: Callable[[int, int], list[Config]],
        sample: Callable[[int, torch.dtype, torch.device], Callable[[], object]],
    ):
        self.name = name
        self.candidates = candidates
        self.sample = sample
        self.chosen: dict[tuple[int, int], Config] = {}
        Tunable.known[name] = self

    def __call__(self, features: int, itemsize: int) -> Config:
        """Return the configuration in force for a last dimension of `features` elements."""
        key = power_of_two(features), itemsize
        chosen = self.chosen.get(key)
        return chosen if chosen is not None else self.candidates(*key)[0]


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
