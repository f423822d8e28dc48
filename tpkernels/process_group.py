"""Helpers for c10d process groups that know nothing of tensor parallelism."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")

_c10d: Any = dist.distributed_c10d  # private names that c10d has no public ones for


def default_group() -> ProcessGroup:
    """Return the default process group, which must have been started."""
    return _c10d._get_default_group()


def find_process_group(name: str) -> ProcessGroup:
    """Return the process group that C++ knows by `name`."""
    return _c10d._resolve_process_group(name)


def is_alive(pg: ProcessGroup | None) -> bool:
    """Return True if `pg` still exists.

    destroy_process_group ends a group, and a group of the next world may have its name.
    """
    return pg is not None and pg in _c10d._world.pg_map


def gather_objects(pg: ProcessGroup, value: T) -> list[T]:
    """Return the `value` of every rank of `pg`, by rank.

    Collective: every rank of the group must call it.
    """
    values: list = [None] * pg.size()
    dist.all_gather_object(values, value, group=pg)
    return values


def broadcast_object(pg: ProcessGroup, value: T) -> T:
    """Return the first rank's `value`; the others' values do not count.

    Collective: every rank of the group must call it.
    """
    box = [value]
    dist.broadcast_object_list(box, group=pg, group_src=0)
    return box[0]
