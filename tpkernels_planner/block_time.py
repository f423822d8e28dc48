"""Seconds of one block's forward and backward pass of one micro-batch.

The formulas are in docs/planner.md.
"""

from __future__ import annotations

from typing import NamedTuple

from .collectives import tensor_parallel_seconds
from .constants import Constants
from .job import Job
from .layout import Layout
from .model import ceil_div

TILE = 128  # rows and columns of a GEMM's tile


class Passes(NamedTuple):
    """Seconds of a forward and a backward pass."""

    forward: float
    backward: float


class BlockTime(NamedTuple):
    """Seconds of one block and micro-batch.

    A pass takes as long as the slower of the GPU's queue and the host. Where the host is slower,
    the two all-reduces of a pass cost less than they take.

    Attributes:
        forward, backward: the passes without communication.
        core: attention between its projections, forward; selective recomputation repeats it.
        all_reduce: one all-reduce.
        forward_exposed, backward_exposed: cost of a pass's two all-reduces.
    """

    forward: float
    backward: float
    core: float
    all_reduce: float
    forward_exposed: float
    backward_exposed: float


def soft_max(a: float, b: float) -> float:
    """Return max(a, b), rounded off where they are close: launches and kernels overlap partly."""
    return (a**3 + b**3) ** (1 / 3)


def bandwidth_16bit(job: Job, c: Constants) -> float:
    """Return the memory bandwidth for byte counts of 16-bit elements in the job's dtype."""
    return c.memory * job.hardware.memory_bytes_per_s * 2 / job.element_bytes


def gemm_seconds(
    m: int, n: int, k: int, job: Job, c: Constants, batch: int = 1, efficiency: float | None = None
) -> float:
    """Predict [m, k] x [k, n]: whole waves of tiles over the multiprocessors, each k deep.

    Args:
        m, n, k: the GEMM's sizes.
        job, c: the job and the GPU's constants.
        batch: GEMMs of one launch.
        efficiency: share of the peak; None: `c.gemm`.
    """
    if not m or not n or not k:
        return 0.0
    processors = job.hardware.multiprocessors
    tiles = ceil_div(m, TILE) * ceil_div(n, TILE) * batch
    waves = tiles / processors + c.tail
    tile = 2 * TILE * TILE * k / (job.peak_flops_per_s / processors)
    compute = waves * tile / (efficiency or c.gemm)
    moved_bytes = job.element_bytes * batch * (m * k + k * n + m * n)
    return max(compute, moved_bytes / (c.memory * job.hardware.memory_bytes_per_s))


def _linear_seconds(job: Job, layout: Layout, c: Constants) -> Passes:
    """Predict the GEMMs of the block's linear layers."""
    rows = layout.micro_batch * job.seq
    forward = backward = 0.0
    for linear in job.model.linears.values():
        shard = linear.shard(layout.tp)
        n = shard.out_features
        k = shard.in_features
        forward += gemm_seconds(rows, n, k, job, c)
        backward += gemm_seconds(rows, k, n, job, c) + gemm_seconds(n, k, rows, job, c)
    return Passes(forward, backward)


def _query_and_kv_features(job: Job, layout: Layout) -> tuple[int, int]:
    """Count a rank's features of queries, and of keys and values."""
    model = job.model
    queries = ceil_div(model.heads, layout.tp) * model.head_dim
    return queries, 2 * ceil_div(model.kv_heads, layout.tp) * model.head_dim


def _attention_seconds(job: Job, layout: Layout, c: Constants) -> Passes:
    """Predict attention's core, between its projections."""
    model = job.model
    seq = job.seq
    bandwidth = bandwidth_16bit(job, c)
    if job.is_megatron:
        batch = layout.micro_batch * ceil_div(model.heads, layout.tp)
        head_dim = model.head_dim
        share = c.attention
        forward = gemm_seconds(seq, seq, head_dim, job, c, batch, share)
        forward += gemm_seconds(seq, head_dim, seq, job, c, batch, share)
        backward = 2 * forward
        scores = batch * seq * seq
        forward += 9 * scores / bandwidth  # softmax 2 + 2, dropout 2 + 2 + 1 bytes
        backward += 11 * scores / bandwidth  # dropout 2 + 1 + 2, softmax 2 + 2 + 2 bytes
        return Passes(forward, backward)
    rows = layout.micro_batch * seq
    queries, kv = _query_and_kv_features(job, layout)
    flops = 4 * rows * seq * queries / 2  # the fused kernel skips the upper triangle
    flops_per_s = c.attention * job.peak_flops_per_s
    forward = flops / flops_per_s + 2 * rows * (2 * queries + kv) / bandwidth
    backward = 2.5 * flops / flops_per_s + 4 * rows * (2 * queries + kv) / bandwidth
    return Passes(forward, backward)


def _elementwise_seconds(job: Job, layout: Layout, c: Constants) -> Passes:
    """Predict the passes between the matrix products, from the bytes that they read and write."""
    model = job.model
    rows = layout.micro_batch * job.seq
    # Elements of norms, dropout and residual.
    hidden = rows * model.hidden / (layout.tp if layout.sequence_parallel else 1)
    queries, kv = _query_and_kv_features(job, layout)
    up = ceil_div(model.ffn, layout.tp)
    qkv = 4 * (queries + kv)
    if job.is_megatron:
        forward = 22 * hidden + rows * (qkv + 4 * queries + 4 * up)
        backward = 34 * hidden + rows * (qkv + 4 * queries + 6 * up)
    else:
        forward = 16 * hidden + rows * (qkv + (6 if model.gated else 4) * up)
        backward = 24 * hidden + rows * (qkv + (10 if model.gated else 6) * up)
    bandwidth = bandwidth_16bit(job, c)
    return Passes(forward / bandwidth, backward / bandwidth)


def block_time(job: Job, layout: Layout, c: Constants) -> BlockTime:
    """Predict one block and micro-batch."""
    linear = _linear_seconds(job, layout, c)
    elementwise = _elementwise_seconds(job, layout, c)
    core = _attention_seconds(job, layout, c)
    all_reduce = tensor_parallel_seconds(job, layout, c)
    host = c.host * (1 + c.skew * ((layout.tp - 1) / 7) ** 2)

    def pass_seconds(gpu: float, queue: float) -> tuple[float, float]:
        """Combine the GPU's seconds with the host's: the pass, and its exposed all-reduces."""
        wait = 2 * all_reduce
        if not job.is_megatron:
            # Row chunks overlap an all-reduce with the GEMMs beside it, except for a part.
            wait -= c.hidden * min(2 * all_reduce, gpu)
        alone = soft_max(gpu, queue)
        return alone, soft_max(gpu + wait, queue) - alone

    gpu_forward = linear.forward + elementwise.forward + core.forward
    gpu_backward = linear.backward + elementwise.backward + core.backward
    forward, forward_exposed = pass_seconds(gpu_forward, host)
    backward, backward_exposed = pass_seconds(gpu_backward, 1.5 * host)
    return BlockTime(forward, backward, core.forward, all_reduce, forward_exposed, backward_exposed)
