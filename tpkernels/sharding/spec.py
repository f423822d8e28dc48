"""ShardSpec: the rows or columns of a parameter that each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Intervals = tuple[tuple[int, int], ...]  # [start, stop) each


def chunk_sizes(size: int, n: int) -> list[int]:
    """Return the sizes of torch.chunk's pieces, padded with zeros to n of them.

    DTensor's Shard holds as much on each rank.

    Example:
        >>> chunk_sizes(7, 4)
        [2, 2, 2, 1]
    """
    step = -(-size // n)
    return [max(0, min(step, size - r * step)) for r in range(n)]


def even_sizes(size: int, n: int) -> list[int]:
    """Return n sizes that differ by at most one, the larger ones first.

    Example:
        >>> even_sizes(9, 4)
        [3, 2, 2, 2]
    """
    return [size // n + (r < size % n) for r in range(n)]


@dataclass(frozen=True)
class ShardSpec:
    """How the ranks divide one dimension of a parameter in its stock layout.

    Attributes:
        dim: the dimension.
        size: its size in the full parameter.
        intervals: for each rank the [start, stop) intervals that its module reads, in the order in
            which its shard holds them. They may overlap: several ranks may read one KV head.
        replicated: every rank stores the full parameter all the same.
        max_shard_size: rows that the largest rank's module reads.

    Example:
        >>> spec = ShardSpec.chunks(7, 2)
        >>> spec.intervals, spec.max_shard_size
        ((((0, 4),), ((4, 7),)), 4)
    """

    dim: int
    size: int
    intervals: tuple[Intervals, ...]
    replicated: bool = False
    max_shard_size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "max_shard_size", max(self.shard_sizes))

    @staticmethod
    def chunks(size: int, n: int, dim: int = 0, blocks: int = 1) -> ShardSpec:
        """Give each rank torch.chunk's piece of each of `blocks` equal blocks.

        [gate; up] packed in one weight has two blocks.
        """
        step, starts = size // blocks, [0]
        for shard_size in chunk_sizes(step, n):
            starts.append(starts[-1] + shard_size)
        return ShardSpec(
            dim,
            size,
            tuple(
                tuple((b * step + starts[r], b * step + starts[r + 1]) for b in range(blocks))
                for r in range(n)
            ),
        )

    @staticmethod
    def units(
        blocks: Sequence[tuple[int, Sequence[Sequence[int]]]],
        width: int,
        dim: int = 0,
        replicated: bool = False,
    ) -> ShardSpec:
        """Give each rank whole units of `width` rows, such as attention heads.

        Args:
            blocks: (units in the block, for each rank the units that it reads).
            width: rows of a unit.
            dim: the sharded dimension.
            replicated: as the attribute.
        """
        intervals: list[list[tuple[int, int]]] = [[] for _ in blocks[0][1]]
        first = 0
        for count, per_rank in blocks:
            for own, units in zip(intervals, per_rank, strict=True):
                for start, stop in _runs(units):
                    own.append(((first + start) * width, (first + stop) * width))
            first += count
        return ShardSpec(dim, first * width, tuple(map(tuple, intervals)), replicated)

    def along(self, dim: int) -> ShardSpec:
        """Return the same division of dimension `dim` of another tensor."""
        return ShardSpec(dim, self.size, self.intervals, self.replicated)

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Rows that each rank's module reads."""
        return [sum(stop - start for start, stop in own) for own in self.intervals]

    @cached_property
    def is_chunk(self) -> bool:
        """True if the shards are torch.chunk's, which DTensor's Shard describes as well."""
        chunks = ShardSpec.chunks(self.size, len(self.intervals), self.dim)
        return not self.replicated and self.intervals == chunks.intervals

    @cached_property
    def has_shared_rows(self) -> bool:
        """True if several ranks read some rows, whose gradients must be summed over the ranks."""
        return sum(self.shard_sizes) > self.size

    @cached_property
    def owned_rows(self) -> list[list[tuple[int, int]]]:
        """Rows of each rank's shard that count as its own, as [start, stop) of the shard.

        A row that several ranks read belongs to the lowest of them, and there to its first place.
        """
        seen: set[int] = set()
        owned = []
        for intervals in self.intervals:
            own = []
            rows = (row for start, stop in intervals for row in range(start, stop))
            for position, row in enumerate(rows):
                if row not in seen:
                    seen.add(row)
                    own.append(position)
            owned.append(_runs(own))
        return owned

    @property
    def padded_shard_size(self) -> int:
        """Rows per rank in a padded DTensor (equal on all ranks)."""
        return self.size if self.replicated else self.max_shard_size

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """Return the part of `full` that `rank` reads; a view where it is one interval."""
        parts = [full.narrow(self.dim, a, b - a) for a, b in self.intervals[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the full tensor from every rank's shard; padding behind a shard is ignored."""
        full = shards[0].new_empty(self._resized(shards[0], self.size))
        for rank, shard in enumerate(shards):
            for target, source in self._pairs(full, shard, rank):
                target.copy_(source)
        return full

    def scatter_add(self, shard: Tensor, rank: int) -> Tensor:
        """Return a full tensor of zeros to which the rows of `rank`'s shard have been added."""
        full = shard.new_zeros(self._resized(shard, self.size))
        for target, source in self._pairs(full, shard, rank):
            target.add_(source)
        return full

    def pad(self, shard: Tensor) -> Tensor:
        """Return `shard` with zeros behind it up to `padded_shard_size`."""
        missing = self.padded_shard_size - shard.size(self.dim)
        if not missing:
            return shard
        return torch.cat([shard, shard.new_zeros(self._resized(shard, missing))], self.dim)

    def _resized(self, tensor: Tensor, size: int) -> list[int]:
        """Return the shape of `tensor` with `size` rows."""
        shape = list(tensor.shape)
        shape[self.dim] = size
        return shape

    def _pairs(self, full: Tensor, shard: Tensor, rank: int):
        """Yield views of the same rows in `full` and in `rank`'s shard."""
        row = 0
        for start, stop in self.intervals[rank]:
            count = stop - start
            yield full.narrow(self.dim, start, count), shard.narrow(self.dim, row, count)
            row += count


def _runs(units: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending units as [start, stop) runs: [0, 1, 4] -> [(0, 2), (4, 5)]."""
    runs: list[tuple[int, int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit:
            runs[-1] = (runs[-1][0], unit + 1)
        else:
            runs.append((unit, unit + 1))
    return runs
