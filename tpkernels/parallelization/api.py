"""tpk.parallelize: an existing model sharded in place, its own forward code unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from ..group import Group, GroupLike, resolve_group
from ..nn.column_linear import ColumnParallelLinear
from ..nn.embedding import VocabParallelEmbedding
from ..nn.parallel_linear import refuse_sequence_parallel
from ..nn.row_linear import RowParallelLinear
from ..nn.tp_region import TPRegion
from ..overlap.schedule import Overlap, check_overlap
from ..sharding.module import ShardedModule, localize, shard_dtensor
from . import huggingface
from .attention import set_local_head_counts
from .blocks import BlockSpecs, PlannedBlock, block_specs, planned_blocks
from .huggingface_plans import auto_plan
from .styles import COLUMN, ROW, match_plan


def parallelize(
    model: nn.Module,
    group: GroupLike = None,
    plan: str | Mapping[str, str] = "auto",
    loss_parallel: bool = True,
    sequence_parallel: bool = False,
    overlap: Overlap = "auto",
    dtensor: bool = True,
) -> nn.Module:
    """Shard `model` over the ranks of `group`, in place.

    Parameters keep their names. Forward, backward and generate give the unsharded model's numbers.

    Collective: every rank of the group must call it, with the same model.

    Args:
        model: the same on every rank.
        group: a 1-D DeviceMesh such as mesh["tp"], a ProcessGroup, or None for the "tp" group of
            `tpk.init_mesh`.
        plan: "auto" (see `auto_plan`), or a dict from module-name patterns (`*` stands for one
            part of the name) to styles (see `tpkernels.parallelization.styles`).
        loss_parallel: a Hugging Face model called with labels computes its loss from sharded
            logits; `out.logits` is then a DTensor Shard(-1). Full logits come from a call without
            labels.
        sequence_parallel: not built yet.
        overlap: of every layer: "auto", False (one chunk) or a number of row chunks.
        dtensor: make all parameters DTensors on the group's mesh, for torch's clip_grad_norm_,
            fused optimizers and fully_shard. False keeps plain local tensors, for DDP and for
            speed: use tpk.clip_grad_norm_ then. With one rank they are plain.

    Returns:
        model.

    Raises:
        ValueError: no plan, a pattern that matches nothing, an unknown style, a module that cannot
            be sharded that way, more ranks than heads. Nothing has been changed then.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = tpk.parallelize(model, mesh["tp"], {"0": "colwise", "2": "rowwise"})
        >>> type(model[0]).__name__
        'ColumnParallelLinear'
    """
    group = resolve_group(group)
    check_overlap(overlap)
    refuse_sequence_parallel(sequence_parallel)
    if any(isinstance(m, ShardedModule) for m in model.modules()):
        raise ValueError("model is parallelized already: parallelize a fresh copy of it")
    if isinstance(plan, Mapping):
        styles = match_plan(model, plan)
    elif plan == "auto":
        styles = match_plan(model, auto_plan(model))
    else:
        raise ValueError(f"plan must be 'auto' or a dict of name patterns to styles, got {plan!r}")
    # Every check is done before anything changes.
    blocks = [
        (block, block_specs(block, group, dtensor)) for block in planned_blocks(model, styles)
    ]
    tied = _check_ties(model, styles)

    shards: dict[int, nn.Parameter] = {}  # id of a tied stock parameter -> its shard
    for block, specs in blocks:
        replaced = _replace_children(block, specs, group, overlap)
        _keep_ties_and_hooks(block, replaced, tied, shards)
        _make_regions(block, group)
        if specs.heads is not None and group.size > 1:
            set_local_head_counts(block.parent, specs.heads, specs.head_dim, group.rank)
    if group.size > 1:
        huggingface.adapt(model, group, loss_parallel)
        if dtensor:
            _as_dtensors(model, group)
    return model


def _check_ties(model: nn.Module, styles: Mapping[str, str]) -> set[int]:
    """Return the ids of parameters that several modules share.

    Raises:
        ValueError: the plan would shard one in two ways.
    """
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{key}")
    for names in users.values():
        kinds = {styles.get(name.rpartition(".")[0], "replicate") for name in names}
        is_embedding_and_head = kinds <= {"embedding_rowwise", "colwise_gather_output"}
        if len(kinds) > 1 and not is_embedding_and_head:
            raise ValueError(
                f"{' and '.join(names)} are one tied parameter: give their modules styles that "
                f"shard it alike, not {', '.join(sorted(kinds))}"
            )
    return {key for key, names in users.items() if len(names) > 1}


def _replace_children(
    block: PlannedBlock, layout: BlockSpecs, group: Group, overlap: Overlap
) -> dict[str, nn.Module]:
    """Put parallel layers in the children's places; return the stock modules by attribute."""
    replaced = {}
    for key, (stock, style) in block.children.items():
        if style in (*COLUMN, "colwise_gather_output"):
            new = ColumnParallelLinear.from_linear(
                stock,
                group=group,
                gather_output=style == "colwise_gather_output",
                overlap=overlap,
                out_spec=layout.specs[key],
            )
        elif style in ROW:
            new = RowParallelLinear.from_linear(
                stock,
                group=group,
                input_is_parallel=style == "rowwise",
                overlap=overlap,
                in_spec=layout.specs[key],
            )
        elif style == "embedding_rowwise":
            assert isinstance(stock, nn.Embedding)
            new = VocabParallelEmbedding.from_embedding(stock, group=group)
        else:
            if style == "replicated_with_grad_allreduce" and group.size > 1:
                localize(stock, group)
            continue
        setattr(block.parent, key, new)
        replaced[key] = stock
    return replaced


def _keep_ties_and_hooks(
    block: PlannedBlock,
    replaced: Mapping[str, nn.Module],
    tied: set[int],
    shards: dict[int, nn.Parameter],
) -> None:
    """Tie the new parameters as the stock ones were, and take the stock modules' hooks over."""
    for key, stock in replaced.items():
        new = block.parent.get_submodule(key)
        for name, parameter in stock._parameters.items():
            if id(parameter) in tied:
                own: Any = new._parameters[name]
                new._parameters[name] = shards.setdefault(id(parameter), own)
        for name, hooks in vars(stock).items():
            if "hooks" in name:
                vars(new)[name] = hooks


def _make_regions(block: PlannedBlock, group: Group) -> None:
    def layers(*styles: str) -> list:
        return [block.parent.get_submodule(key) for key in block.styled(*styles)]

    columns, rows = layers(*COLUMN), layers("rowwise")
    grad_summed = []
    for module in layers("replicated_with_grad_allreduce"):
        grad_summed += [(module, name) for name in getattr(module, "shard_specs", ())]
    for layer in columns:
        for name, spec in layer.shard_specs.items():
            if spec.has_shared_rows:
                grad_summed.append((layer, name))
    if columns and (rows or len(columns) > 1):
        TPRegion(block.parent, columns, rows[0] if rows else None, grad_summed, group)
    gathered = layers("colwise_gather_output")
    if len(gathered) > 1:
        # They share the all-reduce only: what follows is full on every rank.
        TPRegion(block.parent, gathered, None, [], group)


@torch.no_grad()
def _as_dtensors(model: nn.Module, group: Group) -> None:
    """Make every parameter a DTensor on the group's mesh.

    torch's optimizers and norms refuse a mixture with plain tensors, or get it wrong.
    """
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            localize(module, group)
            assert isinstance(module, ShardedModule)
            if id(parameter) not in made:
                dtensor = _as_dtensor(parameter.detach(), module, name)
                made[id(parameter)] = nn.Parameter(dtensor, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def _as_dtensor(local: torch.Tensor, module: ShardedModule, name: str) -> DTensor:
    group, spec = module.group, module.stored_spec(name)
    if spec is None:
        return DTensor.from_local(local, group.mesh, [Replicate()], run_check=False)
    if spec.is_chunk:
        return shard_dtensor(local, group, spec.dim, spec.size)
    return shard_dtensor(spec.pad(local), group, spec.dim, spec.padded_shard_size * group.size)
