"""What the launchers share: row views, accumulation types, and the launch configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A kernel's constexpr block sizes and its launch options."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Tunable:
    """The configurations that a kernel may take, best guess first; `tuning.tune` puts a measured choice in the first's place.

    A choice depends on the kernel, the number of features (rounded up to a power of two) and the element size: on nothing that
    differs between the ranks that compute the same result, and on nothing that is measured while a model runs.

    Args:
        candidates: (features, itemsize) -> configurations.
        sample: (features, dtype, device) -> a call that launches the kernel with the configuration in force, for `tune`.
    """

    known: dict[str, Tunable] = {}  # noqa: RUF012  every Tunable, by name

    def __init__(
        self,
        name: str,
        candidates: Callable[[int, int], list[Config]],
        sample: Callable[..., Callable[[], object]],
    ):
        self.name, self.candidates, self.sample = name, candidates, sample
        self.chosen: dict[tuple[int, int], Config] = {}
        Tunable.known[name] = self

    def __call__(self, features: int, itemsize: int) -> Config:
        key = power_of_two(features), itemsize
        chosen = self.chosen.get(key)
        return chosen if chosen is not None else self.candidates(*key)[0]


def power_of_two(n: int) -> int:
    """The least power of two >= n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def wide(dtype: torch.dtype) -> tl.dtype:
    """What the kernels calculate in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def torch_wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def as_rows(tensor: Tensor) -> Tensor:
    """[..., N] -> [M, N] with unit stride along N; a copy only where a view cannot be had."""
    if tensor.dim() != 2:
        tensor = (
            tensor.reshape(-1, tensor.shape[-1])
            if tensor.numel()
            else tensor.new_empty(tensor.shape[:-1].numel(), tensor.shape[-1])
        )
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def on_device(tensors: Iterable[Tensor | None]) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: this makes it the tensors'."""
    tensor = next(t for t in tensors if t is not None)
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def parts_of(rows: int, rows_per_tile: int, columns: int) -> int:
    """How many programs share a strip of columns: enough to fill a GPU, and so few that the partial sums stay below 5% of the
    bytes moved. From the shape alone, so that a sum has one order on every device."""
    return max(1, min(cdiv(rows, max(rows_per_tile, 64)), cdiv(2048, columns)))


@triton.jit
def sum_partials_kernel(
    partial, first, second, parts, cols, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """first [cols] (and second [cols]) = partial [parts, 1 or 2, cols] added up in one fixed order."""
    width = cols * 2 if second is not None else cols
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), partial.dtype.element_ty)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(
            partial + row.to(tl.int64) * width + col, (row < parts) & (col < width), other=0.0
        )
    value = tl.sum(total, 0).to(first.dtype.element_ty)
    tl.store(first + col, value, col < cols)
    if second is not None:
        tl.store(second + col - cols, value, (col >= cols) & (col < width))


def sum_partials(partial: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """partial [P, K, N] with K of at most 2 -> K tensors [N], which share no storage."""
    parts, count, cols = partial.shape
    out = [partial.new_empty(cols, dtype=dtype) for _ in range(count)]
    if count and cols:
        with on_device([partial]):
            grid = (cdiv(count * cols, 32),)
            sum_partials_kernel[grid](
                partial, out[0], out[1] if count == 2 else None, parts, cols, ROWS=64, COLS=32
            )
    return out
