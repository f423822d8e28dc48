"""The planner in Python: `tpk.plan`."""

from __future__ import annotations

from typing import Any

from .errors import PlanError
from .job import make_job, sequences
from .model import Model
from .model_config import from_config, load_model
from .search import LayoutChoice, search


def _as_model(model: str | Model | Any) -> Model:
    """Load a model by name or path, or read a configuration of transformers or its dictionary."""
    if isinstance(model, Model):
        return model
    if isinstance(model, str):
        return load_model(model)
    if hasattr(model, "to_dict"):
        return from_config(model.to_dict(), type(model).__name__)
    if isinstance(model, dict):
        return from_config(model)
    raise PlanError(
        f"model must be a name, a path, a configuration or a Model, got {type(model).__name__}"
    )


def plan(
    model: str | Model | Any,
    *,
    gpus: int,
    gpu: str = "h100",
    batch_tokens: int | str | None = None,
    global_batch: int | str | None = None,
    seq: int | None = None,
    dtype: str | None = None,
    software: str | None = None,
    gpus_per_node: int | None = None,
    network_gbit: float | None = None,
    max_pp: int | None = 1,
) -> LayoutChoice:
    """Rank the layouts of a model on GPUs, the fastest that fits first.

    `tpk.init_mesh(tpk.plan(...))` makes the mesh of the first one.

    Args:
        model: a named model, the path of a Hugging Face config.json, a configuration of
            transformers, or a `Model`.
        gpus: number of GPUs.
        gpu: a named GPU, or the path of a JSON file that describes one.
        batch_tokens: tokens of a step; "4M" is 4 * 2**20.
        global_batch: sequences of a step, in place of `batch_tokens`.
        seq: tokens of a sequence; None: 2048.
        dtype: "bfloat16", "float16" or "float32"; None: the GPU's 16-bit type.
        software: "tpkernels", or "megatron-2021" (unfused attention, no overlap).
        gpus_per_node: GPUs of a node, in place of the GPU file's.
        network_gbit: Gbit/s of a GPU's share of its node's ports, in place of the GPU file's.
        max_pp: most pipeline stages; tpkernels has no pipeline of its own. None: any.

    Returns:
        The choice: `.best` is the first layout's prediction, `.rows` are all that fit.

    Raises:
        PlanError: a ValueError. An unknown name, a size that makes no sense, or nothing fits: the
            message says by how much, and what would.

    Example:
        >>> from tpkernels_planner import plan
        >>> choice = plan("gpt3-175b", gpus=512, global_batch=256)
        >>> choice.best.layout.words()
        'TP 8, DP 64, SP, ZeRO-2, recompute full, micro-batch 4'
        >>> round(choice.best.step_s, 2)
        4.85
    """
    job = make_job(
        _as_model(model),
        gpu,
        seq,
        dtype=dtype,
        software=software,
        gpus_per_node=gpus_per_node,
        network_gbit=network_gbit,
    )
    return search(job, gpus, sequences(job.seq, batch_tokens, global_batch), max_pp)
