"""Seconds of a training step: blocks, output layer, pipeline, collectives, optimizer.

The formulas are in docs/planner.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .block_time import bandwidth_16bit, block_time, gemm_seconds
from .collectives import data_parallel_seconds, pipeline_seconds
from .constants import Constants
from .job import Job
from .layout import Layout
from .memory import local_parameters
from .model import ceil_div


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by use.

    Attributes:
        compute, recompute: the passes; their repetition for the backward pass.
        tp_exposed, tp_hidden: TP all-reduces; what overlaps with compute.
        pp_exposed, bubble: the pipeline's sends and idle time.
        dp_exposed, dp_hidden: data-parallel collectives; what overlaps with compute.
        optimizer: the optimizer's step.
    """

    compute: float
    recompute: float
    tp_exposed: float
    tp_hidden: float
    pp_exposed: float
    bubble: float
    dp_exposed: float
    dp_hidden: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of all parts that are not hidden."""
        return sum(value for name, value in asdict(self).items() if not name.endswith("hidden"))


def _ends_seconds(job: Job, layout: Layout, c: Constants) -> tuple[float, float]:
    """Predict one micro-batch's embedding, and its output layer and loss, without communication."""
    model = job.model
    rows = layout.micro_batch * job.seq
    vocab = ceil_div(model.vocab, layout.tp)
    bandwidth = bandwidth_16bit(job, c)
    gemms = (
        gemm_seconds(rows, vocab, model.hidden, job, c)
        + gemm_seconds(rows, model.hidden, vocab, job, c)
        + gemm_seconds(vocab, model.hidden, rows, job, c)
    )
    # Bytes a logit: logits to float32, maximum, exponentials, gradients.
    passes = 36 if job.is_megatron else 12
    return 20 * rows * model.hidden / bandwidth, gemms + passes * rows * vocab / bandwidth


def _optimizer_seconds(job: Job, layout: Layout, c: Constants) -> float:
    parameters = local_parameters(job.model, layout) / (layout.dp if layout.zero else 1)
    return c.update * parameters / (c.memory * job.hardware.memory_bytes_per_s) + c.step


def step_time(job: Job, layout: Layout, c: Constants) -> StepTime:
    """Predict a step.

    Args:
        job, layout: the job, and a layout that is possible for its model.
        c: the GPU's constants.
    """
    layers = job.model.layers
    m = layout.micro_batches
    p = layout.pp
    one = block_time(job, layout, c)
    embedding, output = _ends_seconds(job, layout, c)
    sends = pipeline_seconds(job, layout, c)

    block_recompute = 0.0
    block_exposed = one.forward_exposed + one.backward_exposed
    block_all_reduces = 4
    if layout.recompute == "full":
        block_recompute = one.forward
        block_exposed += one.forward_exposed
        block_all_reduces = 6
    elif layout.recompute == "selective" and job.is_megatron:
        block_recompute = one.core
    block_hidden = block_all_reduces * one.all_reduce - block_exposed
    block = one.forward + one.backward + block_recompute + block_exposed
    # One all-reduce after the embedding and one in the loss.
    ends_exposed = 2 * one.all_reduce if layout.tp > 1 else 0.0

    compute = m * (layers * (one.forward + one.backward) + output + embedding) / p
    recompute = m * (layers / p) * block_recompute
    tp_exposed = m * (layers * block_exposed + ends_exposed) / p
    pp_exposed = m * sends
    bubble = 0.0
    if p > 1:
        # 1F1B: all micro-batches pass the slowest stage, and one passes the other stages before
        # and after; interleaving makes that 1 / interleave of it.
        first = embedding + ends_exposed / 2
        last = output + ends_exposed / 2
        slowest = layout.blocks(job.model) * block + max(first, last) + sends
        total = layers * block + first + last + p * sends
        pipeline = m * slowest + (total - slowest) / layout.interleave
        bubble = max(0.0, pipeline - compute - recompute - tp_exposed - pp_exposed)
    dp_total, dp_hidden = data_parallel_seconds(job, layout, c, compute)
    return StepTime(
        compute,
        recompute,
        tp_exposed,
        m * (layers / p) * block_hidden,
        pp_exposed,
        bubble,
        dp_total - dp_hidden,
        dp_hidden,
        _optimizer_seconds(job, layout, c),
    )
