"""Planned blocks: a module with the children that a plan names, checked and given ShardSpecs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..group import Group
from ..nn.embedding import check_embedding
from ..nn.parallel_linear import linear_features
from ..sharding.heads import HeadAssignment
from ..sharding.spec import ShardSpec
from .attention import HEAD_DIM_NAMES, attention_specs, head_dim_of
from .styles import COLUMN, ROW


@dataclass
class PlannedBlock:
    """A module with children that the plan names, such as an attention or an MLP.

    Attributes:
        name: of the module in the model.
        parent: the module.
        children: attribute -> (child, style).
    """

    name: str
    parent: nn.Module
    children: dict[str, tuple[nn.Module, str]]

    def styled(self, *styles: str) -> dict[str, nn.Module]:
        """Return the children that have one of `styles`."""
        return {key: module for key, (module, style) in self.children.items() if style in styles}

    def style(self, key: str) -> str:
        """Return the style of a child."""
        return self.children[key][1]


@dataclass
class BlockSpecs:
    """How a block's children are sharded.

    Attributes:
        specs: attribute -> spec of a column layer's output (dim 0) or a row layer's input (dim 1).
        heads: of an attention module.
        head_dim: features of a head.
    """

    specs: dict[str, ShardSpec]
    heads: HeadAssignment | None = None
    head_dim: int = 0


def planned_blocks(model: nn.Module, styles: Mapping[str, str]) -> list[PlannedBlock]:
    """Group the modules that a plan names by their parents.

    Args:
        model: the model.
        styles: module name -> style.

    Raises:
        ValueError: a module that cannot be sharded as its style says, or a parameter beside
            sharded layers that the plan does not name.
    """
    blocks: dict[str, PlannedBlock] = {}
    for name, style in styles.items():
        parent_name, _, key = name.rpartition(".")
        parent, module = model.get_submodule(parent_name), model.get_submodule(name)
        try:
            if style == "embedding_rowwise":
                check_embedding(module)
            elif style in (*COLUMN, *ROW, "colwise_gather_output"):
                linear_features(module)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r} cannot be sharded as {style!r}: {error}") from None
        block = blocks.setdefault(parent_name, PlannedBlock(parent_name, parent, {}))
        block.children[key] = module, style
    for block in blocks.values():
        _check_unnamed(block, blocks)
    return list(blocks.values())


def _check_unnamed(block: PlannedBlock, planned: Iterable[str]) -> None:
    """Raise if a parameter stands between sharded layers and the plan does not name it.

    The plan must say whether its gradient needs an all-reduce.
    """
    if not block.styled(*COLUMN) or not block.styled("rowwise"):
        return
    prefix = f"{block.name}." if block.name else ""
    for key, module in block.parent.named_children():
        name = prefix + key
        is_planned = key in block.children or any(
            other == name or other.startswith(f"{name}.") for other in planned
        )
        if not is_planned and next(module.parameters(), None) is not None:
            raise ValueError(
                f"{name} has parameters and stands beside sharded layers, but the plan does not "
                "name it: give it 'replicated_with_grad_allreduce' if it is applied to the rank's "
                "own heads or features, 'replicate' if to full activations"
            )
    own = [name for name, _ in block.parent.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{block.name} has parameters of its own ({', '.join(own)}) beside sharded layers: "
            "tpkernels cannot tell how to shard them"
        )


def block_specs(block: PlannedBlock, group: Group, store_full: bool) -> BlockSpecs:
    """Return how a block's children are sharded.

    Args:
        block: the block.
        group: the tensor-parallel group.
        store_full: ranks that share KV heads store their weights in full. As DTensors, copies
            would count twice in torch's norm.

    Raises:
        ValueError: sizes that do not go together, more ranks than heads.
    """
    n = group.size
    specs = {}
    for key, module in block.styled("colwise_gather_output").items():
        specs[key] = ShardSpec.chunks(linear_features(module)[1], n)
    for key, module in block.styled("rowwise_split_input").items():
        specs[key] = ShardSpec.chunks(linear_features(module)[0], n, dim=1)
    columns, rows = block.styled(*COLUMN), block.styled("rowwise")
    head_dim = head_dim_of(block.parent, rows)
    if head_dim is None or not columns:
        return BlockSpecs(specs | _feature_specs(block, n))
    column_styles = {key: block.style(key) for key in columns}
    try:
        heads, head_specs = attention_specs(columns, column_styles, rows, head_dim, n, store_full)
    except ValueError as error:
        raise ValueError(f"{block.name}{error}") from None
    return BlockSpecs(specs | head_specs, heads, head_dim)


def _feature_specs(block: PlannedBlock, n: int) -> dict[str, ShardSpec]:
    """Shard by features outside of attention: column layers' outputs, row layers' inputs."""
    specs, row_sizes = {}, {}
    for key, module in block.styled(*COLUMN).items():
        size, style = linear_features(module)[1], block.style(key)
        if style not in ("colwise", "packed_colwise"):
            raise ValueError(
                f"{block.name}.{key}: {style!r} needs to know the head size: "
                f"{block.name} has none of {', '.join(HEAD_DIM_NAMES)}"
            )
        if style == "packed_colwise" and size % 2:
            raise ValueError(
                f"{block.name}.{key}: 'packed_colwise' shards two equal halves, "
                f"but it has {size} output features"
            )
        halves = 2 if style == "packed_colwise" else 1
        specs[key] = ShardSpec.chunks(size, n, blocks=halves)
        row_sizes[key] = size // halves
    for key, module in block.styled("rowwise").items():
        in_features = linear_features(module)[0]
        for column, row_size in row_sizes.items():
            if row_size != in_features:
                raise ValueError(
                    f"{block.name}: {column} has {specs[column].size} output features but {key} "
                    f"takes {in_features}: they cannot be sharded alike"
                )
        specs[key] = ShardSpec.chunks(in_features, n, dim=1)
    return specs
