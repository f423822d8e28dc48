"""Shard arithmetic: which part of a parameter each rank holds, for any size and any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


def chunk_sizes(size: int, n: int) -> list[int]:
    """Sizes of torch.chunk's pieces, padded with zeros to n of them: what DTensor's Shard holds on each rank."""
    step = -(-size // n)
    return [max(0, min(step, size - r * step)) for r in range(n)]


def even_sizes(size: int, n: int) -> list[int]:
    """n sizes that differ by at most one, the larger ones first."""
    return [size // n + (r < size % n) for r in range(n)]


@dataclass(frozen=True)
class Split:
    """How the ranks divide dimension `dim` (of `size`) of a parameter in its stock layout.

    `ranges[r]` are the [start, stop) intervals that rank r's module reads, in the order in which its shard holds them; they may
    overlap (a KV head read by several ranks). With `replicated` every rank stores the whole parameter all the same. `largest` is the
    number of rows that the largest rank's module reads.
    """

    dim: int
    size: int
    ranges: tuple[Ranges, ...]
    replicated: bool = False
    largest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "largest", max(self.sizes))

    @staticmethod
    def chunks(size: int, n: int, dim: int = 0, blocks: int = 1) -> Split:
        """torch.chunk's pieces of each of `blocks` equal blocks: [gate; up] packed in one weight has two."""
        step, starts = size // blocks, [0]
        for rows in chunk_sizes(step, n):
            starts.append(starts[-1] + rows)
        return Split(
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
    ) -> Split:
        """Whole units of `width` rows (heads): `blocks` lists (units in the block, per rank the units that it reads)."""
        ranges: list[list[tuple[int, int]]] = [[] for _ in blocks[0][1]]
        first = 0
        for count, per_rank in blocks:
            for mine, units in zip(ranges, per_rank, strict=True):
                for start, stop in _runs(units):
                    mine.append(((first + start) * width, (first + stop) * width))
            first += count
        return Split(dim, first * width, tuple(map(tuple, ranges)), replicated)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows that each rank's module reads."""
        return [sum(stop - start for start, stop in ranges) for ranges in self.ranges]

    @cached_property
    def is_chunk(self) -> bool:
        """Whether the ranks' parts are torch.chunk's, so that DTensor's Shard describes the stock layout itself."""
        return (
            not self.replicated
            and self.ranges == Split.chunks(self.size, len(self.ranges), self.dim).ranges
        )

    @cached_property
    def overlaps(self) -> bool:
        """Whether some rows are read more than once, so that their gradients must be summed over the ranks."""
        return sum(self.sizes) > self.size

    @cached_property
    def owned(self) -> list[list[tuple[int, int]]]:
        """For each rank, [start, stop) of its shard's rows that no lower rank, and no earlier row of its own, holds too."""
        seen: set[int] = set()
        owned = []
        for ranges in self.ranges:
            mine = []
            for at, row in enumerate(row for start, stop in ranges for row in range(start, stop)):
                if row not in seen:
                    seen.add(row)
                    mine.append(at)
            owned.append(_runs(mine))
        return owned

    @property
    def stored_size(self) -> int:
        """Rows that a rank's DTensor holds where its own count would not do: the largest rank's, the rest padding."""
        return self.size if self.replicated else self.largest

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """The part of `full` that `rank` reads; a view where it is one interval."""
        parts = [full.narrow(self.dim, start, stop - start) for start, stop in self.ranges[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor from every rank's shard; padding behind a shard is ignored."""
        shape = list(shards[0].shape)
        shape[self.dim] = self.size
        full = shards[0].new_empty(shape)
        for shard, ranges in zip(shards, self.ranges, strict=True):
            row = 0
            for start, stop in ranges:
                full.narrow(self.dim, start, stop - start).copy_(
                    shard.narrow(self.dim, row, stop - start)
                )
                row += stop - start
        return full

    def add_up(self, shard: Tensor, rank: int) -> Tensor:
        """A tensor of the whole shape with the rows of `rank`'s shard added in place, zero elsewhere."""
        shape = list(shard.shape)
        shape[self.dim] = self.size
        full, row = shard.new_zeros(shape), 0
        for start, stop in self.ranges[rank]:
            full.narrow(self.dim, start, stop - start).add_(
                shard.narrow(self.dim, row, stop - start)
            )
            row += stop - start
        return full

    def pad(self, shard: Tensor) -> Tensor:
        """`shard` with zeros behind it up to `stored_size`."""
        missing = self.stored_size - shard.size(self.dim)
        if not missing:
            return shard
        shape = list(shard.shape)
        shape[self.dim] = missing
        return torch.cat([shard, shard.new_zeros(shape)], self.dim)


def _runs(units: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 4] -> [(0, 2), (4, 5)]"""
    runs: list[tuple[int, int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit:
            runs[-1] = (runs[-1][0], unit + 1)
        else:
            runs.append((unit, unit + 1))
    return runs


@dataclass(frozen=True)
class HeadSplit:
    """Attention heads over ranks: rank r computes query heads `q[r]` with KV heads `kv[r]`, `groups[r]` query heads to each."""

    num_heads: int
    num_kv_heads: int
    q: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]

    @property
    def kv_replicated(self) -> bool:
        return len(self.q) > self.num_kv_heads

    def q_split(self, head_dim: int, dim: int = 0) -> Split:
        return Split.units([(self.num_heads, self.q)], head_dim, dim)

    def kv_split(self, head_dim: int, whole: bool = False) -> Split:
        """`whole`: every rank stores the whole parameter where KV heads are replicated."""
        return Split.units(
            [(self.num_kv_heads, self.kv)], head_dim, replicated=whole and self.kv_replicated
        )

    def qkv_split(self, head_dim: int, whole: bool = False) -> Split:
        """Of one fused weight whose rows are [q; k; v]."""
        kv = (self.num_kv_heads, self.kv)
        return Split.units(
            [(self.num_heads, self.q), kv, kv], head_dim, replicated=whole and self.kv_replicated
        )


def split_heads(num_heads: int, num_kv_heads: int, n: int) -> HeadSplit:
    """Heads over n ranks, as evenly as whole KV groups allow; with more ranks than KV heads, as evenly as query heads allow.

    In the second case a rank whose query heads share KV heads unequally (2 of one group and 1 of the next) holds one copy of the
    KV head for each query head, which is what equal groups need.

    Raises:
        ValueError: KV heads do not divide the heads, or there are more ranks than heads.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    if n > num_heads:
        raise ValueError(
            f"{num_heads} attention heads cannot be split over {n} ranks: each needs at least one; use 1 to {num_heads} ranks"
        )
    group = num_heads // num_kv_heads

    def spread(count: int) -> list[range]:
        sizes = even_sizes(count, n)
        return [range(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(n)]

    if n <= num_kv_heads:
        kv = [tuple(heads) for heads in spread(num_kv_heads)]
        q = [tuple(k * group + i for k in heads for i in range(group)) for heads in kv]
        return HeadSplit(num_heads, num_kv_heads, tuple(q), tuple(kv), (group,) * n)
    q, kv, groups = [tuple(heads) for heads in spread(num_heads)], [], []
    for heads in q:
        shares = Counter(h // group for h in heads)
        even = len(set(shares.values())) == 1
        kv.append(tuple(sorted(shares)) if even else tuple(h // group for h in heads))
        groups.append(len(heads) // len(kv[-1]))
    return HeadSplit(num_heads, num_kv_heads, tuple(q), tuple(kv), tuple(groups))
