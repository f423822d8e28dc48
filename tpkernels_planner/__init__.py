"""When TP, when FSDP, when both, and what it will cost: memory, communication and step time of every layout. Needs no torch."""

from __future__ import annotations

from typing import Any

from .advice import advice
from .jobs import make_job, sequences
from .layout import Layout
from .model import Model, PlanError, from_config, load_model
from .search import LayoutChoice, Row, predict, search

__all__ = [
    "Layout",
    "LayoutChoice",
    "Model",
    "PlanError",
    "Row",
    "advice",
    "plan",
    "predict",
    "search",
]


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
    """The layouts of a model on GPUs, the fastest that fits first: `tpk.init_mesh(tpk.plan(...))` makes the first one's mesh.

    Args:
        model: a named model, the path of a Hugging Face config.json, a configuration of transformers, or a `Model`.
        gpus, gpu: how many of what: a named GPU, or the path of a JSON file that describes one.
        batch_tokens, global_batch: of a step, in tokens ("4M" is 4 * 2**20) or sequences: one of them.
        seq: tokens of a sequence; None: 2048.
        dtype: "bfloat16", "float16", "float32"; None: the GPU's 16-bit type.
        software: "tpkernels", or "megatron-2021" (unfused attention, no overlap).
        gpus_per_node, network_gbit: in place of the GPU's file: GPUs of a node, Gbit/s of a GPU's share of its node's ports.
        max_pp: pipeline stages at most; tpkernels has no pipeline of its own. None: any.

    Raises:
        PlanError (a ValueError): unknown names, sizes that make no sense, or nothing fits: by how much, and what would.
    """
    if isinstance(model, str):
        model = load_model(model)
    elif hasattr(model, "to_dict"):
        model = from_config(model.to_dict(), type(model).__name__)
    elif isinstance(model, dict):
        model = from_config(model)
    elif not isinstance(model, Model):
        raise PlanError(
            f"model must be a name, a path, a configuration or a Model, got {type(model).__name__}"
        )
    options = dict(
        dtype=dtype, software=software, gpus_per_node=gpus_per_node, network_gbit=network_gbit
    )
    job = make_job(model, gpu, seq, **options)
    return search(job, gpus, sequences(job.seq, batch_tokens, global_batch), max_pp)
