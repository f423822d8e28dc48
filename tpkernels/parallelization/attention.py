"""Attention modules: their heads over ranks, and the head counts that their own code reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..nn.parallel_linear import linear_features
from ..sharding.heads import HeadAssignment, assign_heads
from ..sharding.spec import ShardSpec
from . import huggingface

# Names that attention modules give to numbers which differ by rank. Each is set on a module only
# where its value says that it is that number.
_NUM_HEADS_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_NUM_KV_HEADS_NAMES = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERIES_PER_KV_NAMES = ("num_key_value_groups", "n_rep")
_WIDTH_NAMES = ("split_size", "all_head_size")
HEAD_DIM_NAMES = ("head_dim", "head_size", "attention_head_size")


def head_dim_of(parent: nn.Module, rows: Mapping[str, nn.Module]) -> int | None:
    """Return the features of one attention head, None outside attention.

    Args:
        parent: the module that may be an attention.
        rows: its row-parallel children.
    """
    head_dim = _first_int(parent, HEAD_DIM_NAMES)
    num_heads = _first_int(parent, _NUM_HEADS_NAMES)
    if not rows or not num_heads:
        return head_dim
    width = linear_features(next(iter(rows.values())))[0]
    if head_dim is None:
        head_dim = width // num_heads
    if head_dim and head_dim * num_heads != width:
        return None  # a block that knows its heads, whose attention is another module
    return head_dim


def _first_int(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def attention_specs(
    columns: Mapping[str, nn.Module],
    column_styles: Mapping[str, str],
    rows: Mapping[str, nn.Module],
    head_dim: int,
    n: int,
    store_full: bool,
) -> tuple[HeadAssignment, dict[str, ShardSpec]]:
    """Shard an attention's projections by whole heads.

    Args:
        columns: column-parallel children by attribute.
        column_styles: their styles.
        rows: row-parallel children; there must be one.
        head_dim: features of a head.
        n: ranks.
        store_full: as HeadAssignment.kv_spec's.

    Raises:
        ValueError: sizes that are not whole heads, more ranks than heads. The message follows the
            attention's name.
    """
    if not rows:
        raise ValueError(
            f" is an attention module whose {', '.join(columns)} are sharded, "
            "but the plan names no 'rowwise' layer in it"
        )
    if len(rows) > 1:
        raise ValueError(
            f" has more than one 'rowwise' layer ({', '.join(rows)}) beside attention heads"
        )
    ((row_key, row),) = rows.items()
    num_heads = linear_features(row)[0] // head_dim
    kv_counts = {}  # as each column layer tells them
    for key, module in columns.items():
        size = linear_features(module)[1]
        count = _count_heads(size, column_styles[key], head_dim, num_heads)
        if count is None:
            raise ValueError(
                f".{key}: {size} output features are not whole heads of {head_dim} that go with "
                f"the {num_heads} heads of {row_key} as {column_styles[key]!r}"
            )
        if count != num_heads:
            kv_counts[key] = count
    if len(set(kv_counts.values())) > 1:
        raise ValueError(f": different numbers of KV heads: {kv_counts}")
    num_kv_heads = next(iter(kv_counts.values()), num_heads)
    try:
        heads = assign_heads(num_heads, num_kv_heads, n)
    except ValueError as error:
        raise ValueError(f": {error}") from None
    specs = {row_key: heads.q_spec(head_dim, dim=1)}
    for key in columns:
        if column_styles[key] == "packed_qkv_colwise":
            specs[key] = heads.qkv_spec(head_dim, store_full)
        elif column_styles[key] == "interleaved_qkv_colwise":
            specs[key] = heads.q_spec(3 * head_dim)
        elif key in kv_counts:
            specs[key] = heads.kv_spec(head_dim, store_full)
        else:
            specs[key] = heads.q_spec(head_dim)
    return heads, specs


def _count_heads(size: int, style: str, head_dim: int, num_heads: int) -> int | None:
    """Return the heads of a column layer, of a packed one its KV heads; None where none fit."""
    count, remainder = divmod(size, head_dim)
    if style == "packed_qkv_colwise":
        count, odd = divmod(count - num_heads, 2)
        remainder = remainder or odd
    elif style == "interleaved_qkv_colwise":
        remainder = remainder or count - 3 * num_heads
        count = num_heads
    if remainder or style == "packed_colwise" or count < 1 or num_heads % count:
        return None
    return count


def set_local_head_counts(
    attention: nn.Module, heads: HeadAssignment, head_dim: int, rank: int
) -> None:
    """Give an attention module the head counts of its rank."""
    q, kv = len(heads.q_heads[rank]), len(heads.kv_heads[rank])
    full_group = heads.num_heads // heads.num_kv_heads
    for names, full, local in (
        (_NUM_HEADS_NAMES, heads.num_heads, q),
        (_NUM_KV_HEADS_NAMES, heads.num_kv_heads, kv),
        (_QUERIES_PER_KV_NAMES, full_group, heads.queries_per_kv[rank]),
        (_WIDTH_NAMES, heads.num_heads * head_dim, q * head_dim),
    ):
        for name in names:
            if getattr(attention, name, None) == full:
                setattr(attention, name, local)
    huggingface.set_local_config(attention, num_attention_heads=q, num_key_value_heads=kv)
