"""Attention heads over ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .spec import ShardSpec, even_sizes


@dataclass(frozen=True)
class HeadAssignment:
    """Query and KV heads that each rank computes.

    Attributes:
        num_heads: query heads of the full layer.
        num_kv_heads: KV heads of the full layer.
        q_heads: query heads of each rank.
        kv_heads: KV heads of each rank, which its query heads use in order.
        queries_per_kv: query heads to a KV head on each rank.
    """

    num_heads: int
    num_kv_heads: int
    q_heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    queries_per_kv: tuple[int, ...]

    @property
    def kv_replicated(self) -> bool:
        """True if there are more ranks than KV heads, so that ranks hold copies of them."""
        return len(self.q_heads) > self.num_kv_heads

    def q_spec(self, head_dim: int, dim: int = 0) -> ShardSpec:
        """Return the spec of the queries' weight, or with dim=1 of the output projection's."""
        return ShardSpec.units([(self.num_heads, self.q_heads)], head_dim, dim)

    def kv_spec(self, head_dim: int, store_full: bool = False) -> ShardSpec:
        """Return the spec of the keys' or values' weight.

        Args:
            head_dim: features of a head.
            store_full: every rank stores the full parameter where KV heads are replicated.
        """
        replicated = store_full and self.kv_replicated
        return ShardSpec.units(
            [(self.num_kv_heads, self.kv_heads)], head_dim, replicated=replicated
        )

    def qkv_spec(self, head_dim: int, store_full: bool = False) -> ShardSpec:
        """Return the spec of one packed weight whose rows are [q; k; v]; see `kv_spec`."""
        kv = (self.num_kv_heads, self.kv_heads)
        replicated = store_full and self.kv_replicated
        return ShardSpec.units(
            [(self.num_heads, self.q_heads), kv, kv], head_dim, replicated=replicated
        )


def assign_heads(num_heads: int, num_kv_heads: int, n: int) -> HeadAssignment:
    """Assign heads to n ranks, as evenly as whole KV groups allow.

    With more ranks than KV heads they are assigned as evenly as query heads allow. A rank whose
    query heads then share KV heads unequally (2 use one and 1 the next) holds a copy of the KV
    head for each query head, which makes the groups equal.

    Raises:
        ValueError: KV heads do not divide the heads, or there are more ranks than heads.

    Example:
        >>> assign_heads(9, 3, 2).q_heads
        ((0, 1, 2, 3, 4, 5), (6, 7, 8))
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    if n > num_heads:
        raise ValueError(
            f"{num_heads} attention heads cannot be sharded over {n} ranks: "
            f"each needs at least one; use 1 to {num_heads} ranks"
        )
    group_size = num_heads // num_kv_heads
    if n <= num_kv_heads:
        kv_heads = _spread(num_kv_heads, n)
        q_heads = tuple(
            tuple(kv * group_size + i for kv in heads for i in range(group_size))
            for heads in kv_heads
        )
        return HeadAssignment(num_heads, num_kv_heads, q_heads, kv_heads, (group_size,) * n)
    q_heads = _spread(num_heads, n)
    kv_heads = tuple(_kv_heads_of(heads, group_size) for heads in q_heads)
    queries_per_kv = tuple(len(q) // len(kv) for q, kv in zip(q_heads, kv_heads, strict=True))
    return HeadAssignment(num_heads, num_kv_heads, q_heads, kv_heads, queries_per_kv)


def _spread(count: int, n: int) -> tuple[tuple[int, ...], ...]:
    """Return `count` heads as n consecutive runs of even sizes."""
    sizes = even_sizes(count, n)
    return tuple(tuple(range(sum(sizes[:r]), sum(sizes[: r + 1]))) for r in range(n))


def _kv_heads_of(q_heads: tuple[int, ...], group_size: int) -> tuple[int, ...]:
    """Return the KV heads that `q_heads` use, with copies where they use them unequally often."""
    uses = Counter(head // group_size for head in q_heads)
    if len(set(uses.values())) == 1:
        return tuple(sorted(uses))
    return tuple(head // group_size for head in q_heads)
