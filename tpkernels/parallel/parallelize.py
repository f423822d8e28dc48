"""tpk.parallelize: an existing model split in place, its own forward code unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from ..group import Group, resolve_group
from ..nn.embedding import VocabParallelEmbedding, check_embedding
from ..nn.linear import ColumnParallelLinear, RowParallelLinear, linear_features
from ..nn.region import SplitRegion
from ..nn.sharded import Sharded, localize, shard_dtensor
from ..schedule import check_overlap
from ..shard import HeadSplit, Split, split_heads
from . import huggingface
from .plans import auto_plan, match_plan
from .styles import COLUMN, ROW

# What attention modules call the numbers that change with their share, each set on that module only where its value says that it
# is that number.
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_GROUPS = ("num_key_value_groups", "n_rep")
_WIDTH = ("split_size", "all_head_size")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")


def parallelize(
    model: nn.Module,
    group=None,
    plan: str | Mapping[str, str] = "auto",
    loss_parallel: bool = True,
    sequence_parallel: bool = False,
    overlap: str | bool | int = "auto",
    dtensor: bool = True,
) -> nn.Module:
    """Splits `model` over the ranks of `group`, in place; every rank must hold the same model before.

    Parameters keep their names. Forward, backward and generate give the unsplit model's numbers.

    Args:
        group: a 1-D DeviceMesh such as mesh["tp"], a ProcessGroup, or None for the "tp" group of `tpk.init_mesh`.
        plan: "auto" (see `auto_plan`), or a dict from module-name patterns (`*` stands for one part of the name) to styles
            (see `STYLES`).
        loss_parallel: a Hugging Face model called with labels computes its loss from split logits; `out.logits` is then a DTensor
            Shard(-1). Whole logits come from a call without labels.
        overlap: of every layer: "auto", False (one chunk) or a number of row chunks.
        dtensor: make all parameters DTensors on the group's mesh, for torch's clip_grad_norm_, fused optimizers and fully_shard.
            False keeps plain local tensors, for DDP and for speed: use tpk.clip_grad_norm_ then. With one rank they are plain.

    Returns:
        model.

    Raises:
        ValueError: no plan, a pattern that matches nothing, an unknown style, a module that cannot be split that way, more ranks
            than heads. Nothing has been changed then.
    """
    group = resolve_group(group)
    check_overlap(overlap)
    if sequence_parallel:
        raise NotImplementedError("sequence_parallel=True is not built yet: pass False")
    if any(isinstance(m, Sharded) for m in model.modules()):
        raise ValueError("model is parallelized already: parallelize a fresh copy of it")
    if not isinstance(plan, Mapping) and plan != "auto":
        raise ValueError(f"plan must be 'auto' or a dict of name patterns to styles, got {plan!r}")
    styles = match_plan(model, auto_plan(model) if plan == "auto" else plan)
    families = _families(model, styles)
    layouts = {
        family.name: _layout(family, group, dtensor) for family in families
    }  # every check is done before anything changes
    tied = _check_ties(model, styles)

    shared: dict[int, nn.Parameter] = {}  # id of a tied stock parameter -> its shard
    for family in families:
        _split_family(family, layouts[family.name], group, overlap, tied, shared)
    if group.size > 1:
        huggingface.adapt(model, group, loss_parallel)
        if dtensor:
            _as_dtensors(model, group)
    return model


@dataclass
class _Family:
    """A module with children that the plan names."""

    name: str
    parent: nn.Module
    children: dict[str, tuple[nn.Module, str]]  # attribute -> (module, style)

    def styled(self, *styles: str) -> dict[str, nn.Module]:
        return {key: module for key, (module, style) in self.children.items() if style in styles}


@dataclass
class _Layout:
    """How a family's children are divided."""

    splits: dict[str, Split]  # of columns' output (dim 0) and rows' input (dim 1) features
    heads: HeadSplit | None = None
    head_dim: int = 0


def _families(model: nn.Module, styles: Mapping[str, str]) -> list[_Family]:
    families: dict[str, _Family] = {}
    for name, style in styles.items():
        parent_name, _, key = name.rpartition(".")
        parent, module = model.get_submodule(parent_name), model.get_submodule(name)
        try:
            if style == "embedding_rowwise":
                check_embedding(module)
            elif style in (*COLUMN, *ROW, "colwise_gather_output"):
                linear_features(module)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r} cannot be split as {style!r}: {error}") from None
        families.setdefault(parent_name, _Family(parent_name, parent, {})).children[key] = (
            module,
            style,
        )
    for family in families.values():
        _check_unnamed(family, families)
    return list(families.values())


def _check_unnamed(family: _Family, families: Mapping[str, _Family]) -> None:
    """A parameter between split layers gets part of its gradient on each rank: which ones are, only the plan can say."""
    if not (family.styled(*COLUMN) and family.styled("rowwise")):
        return
    prefix = f"{family.name}." if family.name else ""
    for key, module in family.parent.named_children():
        name = prefix + key
        split_inside = any(other == name or other.startswith(f"{name}.") for other in families)
        if (
            key not in family.children
            and not split_inside
            and any(True for _ in module.parameters())
        ):
            raise ValueError(
                f"{name} has parameters and stands beside split layers, but the plan does not name it: give it "
                "'replicated_with_grad_allreduce' if it is applied to the rank's own heads or features, 'replicate' if to whole activations"
            )
    own = [name for name, _ in family.parent.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{family.name} has parameters of its own ({', '.join(own)}) beside split layers: tpkernels cannot tell how to split them"
        )


def _layout(family: _Family, group: Group, whole: bool) -> _Layout:
    """`whole`: KV heads that several ranks read are stored whole on each: as DTensors, copies would count twice in torch's norm."""
    n = group.size
    columns, rows = family.styled(*COLUMN), family.styled("rowwise")
    splits = {
        key: Split.chunks(linear_features(m)[1], n)
        for key, m in family.styled("colwise_gather_output").items()
    }
    splits |= {
        key: Split.chunks(linear_features(m)[0], n, dim=1)
        for key, m in family.styled("rowwise_split_input").items()
    }
    head_dim = _head_dim(family.parent, rows)
    if head_dim is None or not columns:
        for key, module in columns.items():
            size, style = linear_features(module)[1], family.children[key][1]
            if style not in ("colwise", "packed_colwise"):
                raise ValueError(
                    f"{family.name}.{key}: {style!r} needs to know the head size: {family.name} has none of {', '.join(_HEAD_DIM)}"
                )
            if style == "packed_colwise" and size % 2:
                raise ValueError(
                    f"{family.name}.{key}: 'packed_colwise' splits two equal halves, but it has {size} output features"
                )
            splits[key] = Split.chunks(size, n, blocks=2 if style == "packed_colwise" else 1)
        for key, module in rows.items():
            splits[key] = Split.chunks(linear_features(module)[0], n, dim=1)
            for other, split in ((k, splits[k]) for k in columns):
                blocks = 2 if family.children[other][1] == "packed_colwise" else 1
                if split.size != splits[key].size * blocks:
                    raise ValueError(
                        f"{family.name}: {other} has {split.size} output features but {key} takes {splits[key].size}: they cannot be split alike"
                    )
        return _Layout(splits)

    if not rows:
        raise ValueError(
            f"{family.name} is an attention module whose {', '.join(columns)} are split, but the plan names no 'rowwise' layer in it"
        )
    if len(rows) > 1:
        raise ValueError(
            f"{family.name} has more than one 'rowwise' layer ({', '.join(rows)}) beside attention heads"
        )
    ((row_key, row),) = rows.items()
    num_heads = linear_features(row)[0] // head_dim
    counts = {}  # KV heads as each column layer tells them
    for key, module in columns.items():
        size, style = linear_features(module)[1], family.children[key][1]
        units, left = divmod(size, head_dim)
        if style == "packed_qkv_colwise":
            units, odd = divmod(units - num_heads, 2)
            left = left or odd
        elif style == "interleaved_qkv_colwise":
            units, left = num_heads, left or units != 3 * num_heads
        elif style == "packed_colwise":
            left = 1
        if left or units < 1 or num_heads % units:
            raise ValueError(
                f"{family.name}.{key}: {size} output features are not whole heads of {head_dim} that go with the {num_heads} heads of {row_key} as {style!r}"
            )
        if units != num_heads:
            counts[key] = units
    if len(set(counts.values())) > 1:
        raise ValueError(f"{family.name}: different numbers of KV heads: {counts}")
    try:
        heads = split_heads(num_heads, next(iter(counts.values()), num_heads), n)
    except ValueError as error:
        raise ValueError(f"{family.name}: {error}") from None
    for key in columns:
        style = family.children[key][1]
        if style == "packed_qkv_colwise":
            splits[key] = heads.qkv_split(head_dim, whole)
        elif style == "interleaved_qkv_colwise":
            splits[key] = heads.q_split(3 * head_dim)
        else:
            splits[key] = (
                heads.kv_split(head_dim, whole) if key in counts else heads.q_split(head_dim)
            )
    splits[row_key] = heads.q_split(head_dim, dim=1)
    return _Layout(splits, heads, head_dim)


def _head_dim(parent: nn.Module, rows: Mapping[str, nn.Module]) -> int | None:
    """Features of one attention head, None outside attention."""
    size, count = (
        next((n for name in names if isinstance(n := getattr(parent, name, None), int)), None)
        for names in (_HEAD_DIM, _NUM_HEADS)
    )
    width = linear_features(next(iter(rows.values())))[0] if rows else None
    if size is None and count and width:
        size = width // count
    if size and count and width and size * count != width:
        return None  # a block that knows its heads, whose attention is another module
    return size


def _check_ties(model: nn.Module, styles: Mapping[str, str]) -> dict[int, nn.Parameter]:
    """The parameters that several modules share, by id; raises ValueError where the plan would split one in two ways."""
    users: dict[int, list[str]] = {}
    tied: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{key}")
                if len(users[id(parameter)]) > 1:
                    tied[id(parameter)] = parameter
    for names in users.values():
        kinds = {styles.get(name.rpartition(".")[0], "replicate") for name in names}
        tied_tables = kinds <= {"embedding_rowwise", "colwise_gather_output"}
        if len(kinds) > 1 and not tied_tables:
            raise ValueError(
                f"{' and '.join(names)} are one tied parameter: give their modules styles that split it alike, not {', '.join(sorted(kinds))}"
            )
    return tied


def _split_family(
    family: _Family,
    layout: _Layout,
    group: Group,
    overlap,
    tied: Mapping[int, nn.Parameter],
    shared: dict[int, nn.Parameter],
) -> None:
    parent, options = family.parent, dict(group=group, overlap=overlap)
    made: dict[str, nn.Module] = {}
    for key, (old, style) in family.children.items():
        if style in (*COLUMN, "colwise_gather_output"):
            gathers = style == "colwise_gather_output"
            new = ColumnParallelLinear.from_linear(
                old, out_split=layout.splits[key], gather_output=gathers, **options
            )
        elif style in ROW:
            new = RowParallelLinear.from_linear(
                old, in_split=layout.splits[key], input_is_parallel=style == "rowwise", **options
            )
        elif style == "embedding_rowwise":
            new = VocabParallelEmbedding.from_embedding(old, group=group)
        else:
            if style == "replicated_with_grad_allreduce" and group.size > 1:
                localize(old, group)
            made[key] = old
            continue
        for name, parameter in old._parameters.items():
            if id(parameter) in tied:
                new._parameters[name] = shared.setdefault(id(parameter), new._parameters[name])
        for name, hooks in vars(old).items():
            if "hooks" in name:
                vars(new)[name] = hooks
        made[key] = new
        setattr(parent, key, new)

    columns = [made[key] for key in family.styled(*COLUMN)]
    rows = [made[key] for key in family.styled("rowwise")]
    summed = [
        (made[key], name)
        for key in family.styled("replicated_with_grad_allreduce")
        for name in getattr(made[key], "splits", ())
    ]
    summed += [
        (layer, name) for layer in columns for name, split in layer.splits.items() if split.overlaps
    ]
    if columns and (rows or len(columns) > 1):
        SplitRegion(parent, columns, rows[0] if rows else None, summed, group)
    gathered = [made[key] for key in family.styled("colwise_gather_output")]
    if len(gathered) > 1:
        SplitRegion(
            parent, gathered, None, [], group
        )  # what follows is whole on every rank: only the all-reduce is shared
    if layout.heads is not None and group.size > 1:
        _set_share(parent, layout.heads, layout.head_dim, group.rank)


def _set_share(parent: nn.Module, heads: HeadSplit, head_dim: int, rank: int) -> None:
    """Tells an attention module its own head counts."""
    q, kv = len(heads.q[rank]), len(heads.kv[rank])
    for names, whole, mine in (
        (_NUM_HEADS, heads.num_heads, q),
        (_NUM_KV_HEADS, heads.num_kv_heads, kv),
        (_GROUPS, heads.num_heads // heads.num_kv_heads, heads.groups[rank]),
        (_WIDTH, heads.num_heads * head_dim, q * head_dim),
    ):
        for name in names:
            if getattr(parent, name, None) == whole:
                setattr(parent, name, mine)
    huggingface.set_config_share(parent, num_attention_heads=q, num_key_value_heads=kv)


@torch.no_grad()
def _as_dtensors(model: nn.Module, group: Group) -> None:
    """Every parameter a DTensor on the group's mesh: torch's optimizers and norms refuse, or get wrong, a mixture."""
    done: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            localize(module, group)
            if id(parameter) not in done:
                split, local = module.divided(name), parameter.detach()
                if split is None:
                    tensor = DTensor.from_local(local, group.mesh, [Replicate()], run_check=False)
                elif split.is_chunk:
                    tensor = shard_dtensor(local, group, split.dim, split.size)
                else:
                    tensor = shard_dtensor(
                        split.pad(local), group, split.dim, split.stored_size * group.size
                    )
                done[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
            module._parameters[name] = done[id(parameter)]
