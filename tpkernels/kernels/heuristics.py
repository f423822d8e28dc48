"""Candidate tile sizes and split counts of the Triton kernels, all in one place.

The functions `*_tiles` list the launch configurations that a kernel may take, best guess first;
`tuning.tune` measures them. `*_splits` say over how many programs a sum over rows is split.
All of them depend on shapes and dtypes alone. This file does not import Triton.
"""

from __future__ import annotations

from collections.abc import Iterable

from .launch_config import Config, cdiv

# Programs of the norm's backward, at most: two on each of a GPU's processors.
NORM_MAX_SPLITS = 256
# Small inputs get at least this many, because filling the GPU comes first there.
NORM_MIN_SPLITS = 64


def column_linear_tiles(features: int, itemsize: int) -> list[Config]:
    """Return the GEMM's tiles; full precision has as many bytes a tile as half precision."""
    shapes = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (64, 128, 64, 4, 3), (16, 128, 128, 4, 3))
    if itemsize > 2:
        shapes = ((64, 64, 32, 4, 2), (128, 64, 32, 4, 2))
    return [
        Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8), warps, stages)
        for m, n, k, warps, stages in shapes
    ]


def gated_column_linear_tiles(features: int, itemsize: int) -> list[Config]:
    """Return the GEMM's tiles with half as many columns: a program holds two accumulators."""
    halved = [
        Config({**c.blocks, "BLOCK_N": c.blocks["BLOCK_N"] // 2}, *c[1:])
        for c in column_linear_tiles(features, itemsize)
    ]
    return [c for c in halved if c.blocks["BLOCK_N"] >= 32]


def activation_tiles(features: int, itemsize: int) -> list[Config]:
    """Return tiles two warp rows wide; a warp's row of 16-byte accesses is 32 * 16 bytes.

    A tile has as many rows as give each thread two to four accesses.
    """
    cols = min(max(features, 16), 512 // itemsize * 2)
    return _strips(cols, ((4096, 4), (2048, 4), (8192, 8), (4096, 8)))


def gated_act_backward_tiles(features: int, itemsize: int) -> list[Config]:
    """Return the activation's tiles, smallest first.

    A program holds two sums and three inputs: half the tile keeps twice as many programs on a
    processor.
    """
    return sorted(activation_tiles(features, itemsize), key=lambda config: config.blocks["BLOCK_M"])


def bias_grad_splits(M: int, rows_per_tile: int, columns: int) -> int:
    """Return how many programs share a strip of columns when a bias's gradient is summed.

    They fill a GPU, and are so few that the partial sums stay below 5% of the bytes moved. The
    number depends on the shape alone, so that a sum has one order on every device.
    """
    return max(1, min(cdiv(M, max(rows_per_tile, 64)), cdiv(2048, columns)))


def norm_tiles(features: int, itemsize: int) -> list[Config]:
    """Return tiles of whole rows, or for rows that do not fit in registers, blocks of a row."""
    if features * max(itemsize, 4) > 16384 * 4:
        return [
            Config(dict(BLOCK_M=1, BLOCK_N=size), warps)
            for size, warps in ((8192, 16), (4096, 8), (4096, 4))
        ]
    warps = max(features // 512, 4)
    few_warps = max(features // 1024, 4)
    return _whole_rows(
        features, ((2048, warps), (2048, few_warps), (2048, 2 * warps), (4096, 2 * warps))
    )


def norm_backward_tiles(features: int, itemsize: int) -> list[Config]:
    """Return tiles of whole rows, or for rows that do not fit in registers, of parts of rows.

    A row takes up to four times its size: two sums, the gradient and x.
    """
    if features * max(itemsize, 4) > 8192 * 4:
        return [
            Config(dict(BLOCK_M=rows, BLOCK_N=size), warps)
            for rows, size, warps in ((8, 1024, 16), (4, 1024, 8), (8, 512, 8))
        ]
    warps = max(features // 512, 4)
    return _whole_rows(features, ((2048, warps), (2048, 2 * warps), (4096, 2 * warps)))


def norm_backward_splits(M: int, rows_per_tile: int, sums: int) -> int:
    """Return how many programs share the rows when `sums` parameters' gradients are summed.

    Their partial sums are at most 4% of the bytes that half precision moves, but for small inputs.
    """
    most = min(max(NORM_MIN_SPLITS, M // (25 * max(sums, 1))), NORM_MAX_SPLITS)
    return max(1, min(cdiv(M, max(rows_per_tile, 4)), most))


def cross_entropy_stats_tiles(features: int, itemsize: int) -> list[Config]:
    """Return tiles whose programs walk along rows of logits."""
    return _strips(features, ((4096, 8), (4096, 4), (2048, 4), (8192, 16)))


def cross_entropy_grad_tiles(features: int, itemsize: int) -> list[Config]:
    """Return tiles of which a program takes one."""
    return _strips(features, ((4096, 4), (2048, 4), (8192, 8), (4096, 8)))


def dropout_tiles(features: int, itemsize: int) -> list[Config]:
    """Return tiles four warp rows wide."""
    cols = min(max(features, 16), 512 // itemsize * 4)
    return _strips(cols, ((2048, 4), (4096, 8), (1024, 4), (4096, 4)))


def rotary_tiles(features: int, itemsize: int) -> list[Config]:
    """Return how many (token, head) pairs a program takes, of `features` rotated features each."""
    sizes = ((4096, 4), (2048, 4), (8192, 8), (2048, 2))
    return [Config(dict(BLOCK_M=max(1, size // features)), warps) for size, warps in sizes]


def _strips(features: int, sizes: Iterable[tuple[int, int]]) -> list[Config]:
    """Return tiles of (elements, warps) that are at most `features` wide."""
    return [
        Config(dict(BLOCK_M=max(1, size // features), BLOCK_N=min(size, features)), warps)
        for size, warps in sizes
    ]


def _whole_rows(features: int, sizes: Iterable[tuple[int, int]]) -> list[Config]:
    """Return tiles of (elements, warps) with at least one whole row, each once."""
    tiles = dict.fromkeys((max(1, size // features), min(warps, 16)) for size, warps in sizes)
    return [Config(dict(BLOCK_M=rows, BLOCK_N=features), warps) for rows, warps in tiles]
