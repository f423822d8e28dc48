"""How long a training step takes: compute by GEMM shape, memory-bound passes, collectives by message, pipeline, optimizer.

Seconds everywhere. The constants are fitted to measured steps (fit.py, data/fitted.json); the formulas are in docs/planner.md.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from .hardware import Hardware, bus_share
from .layout import Job, Layout
from .memory import element_bytes, local_parameters, message_bytes
from .model import DATA, ceil_div, near

TILE = 128  # rows and columns of a GEMM's tile


@dataclass(frozen=True)
class Constants:
    """Fitted to one GPU's measured steps (fit.py), or assumed in its file.

    Attributes:
        gemm: share of the peak that a GEMM of many full tiles reaches. attention: the same for attention's core.
        tail: waves of tiles that a GEMM loses at its end.
        memory: share of the memory bandwidth that element-wise kernels reach.
        host: seconds that Python and the launches of a block's forward pass take, however small it is; backward half as much again.
        skew: what that grows by on 8 TP ranks, which wait for the slowest: a share of it; on others by the square of their number less one.
        link, network: share of the bus bandwidth that collectives reach, in a node and between nodes.
        reduce, send: seconds of an all-reduce, of a pipeline's send, beside what their bytes take.
        update: bytes that the optimizer moves for a parameter.
        step: seconds of a step beside everything else.
        hidden: most of a collective's time, as a share, that hides under what it overlaps with.
    """

    gemm: float
    attention: float
    tail: float
    memory: float
    host: float
    skew: float
    link: float
    network: float
    reduce: float
    send: float
    update: float
    step: float
    hidden: float


@functools.cache
def constants_of(hardware: Hardware) -> Constants:
    """The constants fitted to the GPU, or to the one its file names, under those that its file itself states."""
    fitted = json.loads((DATA / "fitted.json").read_text())["constants"]
    if hardware.constants_of not in fitted:
        raise near("GPU with fitted constants", hardware.constants_of, fitted)
    return Constants(**{**fitted[hardware.constants_of], **dict(hardware.constants)})


def gemm_seconds(
    m: int, n: int, k: int, job: Job, c: Constants, batch: int = 1, efficiency: float | None = None
) -> float:
    """[m, k] x [k, n], `batch` of them in one launch: whole waves of tiles over the multiprocessors, each K deep."""
    if not m or not n or not k:
        return 0.0
    tiles = ceil_div(m, TILE) * ceil_div(n, TILE) * batch
    waves = tiles / job.hardware.multiprocessors + c.tail
    tile = 2 * TILE * TILE * k / (job.hardware.peak(job.dtype) / job.hardware.multiprocessors)
    seconds = waves * tile / (efficiency or c.gemm)
    moved = (
        element_bytes(job)
        * batch
        * (m * k + k * n + m * n)
        / (c.memory * job.hardware.memory_bytes_per_s)
    )
    return max(seconds, moved)


def soft_max(a: float, b: float) -> float:
    """max(a, b), rounded off where they are close: launches and kernels do not overlap perfectly."""
    return (a**3 + b**3) ** (1 / 3)


class Block(NamedTuple):
    """One block and micro-batch, seconds. A pass takes as long as the GPU's queue or the host's, so that its two all-reduces cost
    (`exposed`) less than they take (`reduce`, of one) where the host is the slower."""

    forward: float  # without communication
    backward: float
    core: (
        float  # of attention between its projections, forward: what selective recomputation repeats
    )
    reduce: float
    forward_exposed: float
    backward_exposed: float


def ring(message: float, ranks: int, passes: int, bus: float, c: Constants) -> float:
    """A collective over `ranks` of one link: `passes` 2 for an all-reduce, 1 for its halves."""
    if ranks == 1 or not message:
        return 0.0
    return c.reduce + passes * (ranks - 1) / ranks * message / (bus * bus_share(message, bus))


def block(job: Job, layout: Layout, c: Constants) -> Block:
    model, tp, hardware = job.model, layout.tp, job.hardware
    rows, seq = layout.micro_batch * job.seq, job.seq
    old = job.software == "megatron-2021"

    forward = backward = 0.0
    for linear in model.linears.values():
        shard = linear.shard(tp)
        n, k = shard.outputs, shard.inputs
        forward += gemm_seconds(rows, n, k, job, c)
        backward += gemm_seconds(rows, k, n, job, c) + gemm_seconds(n, k, rows, job, c)

    heads, head_dim = ceil_div(model.heads, tp), model.head_dim
    bandwidth = (
        c.memory * hardware.memory_bytes_per_s * 2 / element_bytes(job)
    )  # the counts below are of 16-bit elements
    kv = 2 * ceil_div(model.kv_heads, tp) * head_dim
    inner = heads * head_dim
    up = ceil_div(model.ffn, tp)
    # Bytes an element: what the passes between the matrix products read and write, forward and backward.
    whole = (
        rows * model.hidden / (tp if layout.sequence_parallel else 1)
    )  # of the norms, dropout and residual
    if old:
        batch = layout.micro_batch * heads
        core = gemm_seconds(seq, seq, head_dim, job, c, batch, c.attention) + gemm_seconds(
            seq, head_dim, seq, job, c, batch, c.attention
        )
        core_back = 2 * core
        scores = batch * seq * seq
        core += 9 * scores / bandwidth  # softmax 2 + 2, dropout 2 + 2 + 1
        core_back += 11 * scores / bandwidth  # dropout 2 + 1 + 2, softmax 2 + 2 + 2
        forward += (22 * whole + rows * (4 * (inner + kv) + 4 * inner + 4 * up)) / bandwidth
        backward += (34 * whole + rows * (4 * (inner + kv) + 4 * inner + 6 * up)) / bandwidth
    else:
        flops = 4 * rows * seq * inner / 2  # causal: the fused kernel leaves the upper triangle out
        core = (
            flops / (c.attention * hardware.peak(job.dtype))
            + 2 * rows * (2 * inner + kv) / bandwidth
        )
        core_back = (
            2.5 * flops / (c.attention * hardware.peak(job.dtype))
            + 4 * rows * (2 * inner + kv) / bandwidth
        )
        forward += (
            16 * whole + rows * (4 * (inner + kv) + (6 if model.gated else 4) * up)
        ) / bandwidth
        backward += (
            24 * whole + rows * (4 * (inner + kv) + (10 if model.gated else 6) * up)
        ) / bandwidth
    link = hardware.link.bus_bytes_per_s * c.link
    if layout.crosses("tp", hardware):
        link = min(link, hardware.gpus_per_node * hardware.network.bus_bytes_per_s * c.network)
    reduce = ring(message_bytes(job, layout), tp, 2, link, c)
    host = c.host * (1 + c.skew * ((tp - 1) / 7) ** 2)
    passes, exposed = [], []
    for gpu, queue in ((forward + core, host), (backward + core_back, 1.5 * host)):
        # Overlap: chunks of rows hide an all-reduce under the GEMMs beside it, all but a part of it.
        wait = 2 * reduce if old else 2 * reduce - c.hidden * min(2 * reduce, gpu)
        passes.append(soft_max(gpu, queue))
        exposed.append(soft_max(gpu + wait, queue) - passes[-1])
    return Block(*passes, core, reduce, *exposed)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; `total` is the sum of all but the hidden ones."""

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
        return sum(value for name, value in asdict(self).items() if not name.endswith("hidden"))


def head_seconds(job: Job, layout: Layout, c: Constants) -> tuple[float, float]:
    """(forward and backward of the output layer and the loss, of the embedding), one micro-batch."""
    model, rows = job.model, layout.micro_batch * job.seq
    vocab = ceil_div(model.vocab, layout.tp)
    bandwidth = c.memory * job.hardware.memory_bytes_per_s * 2 / element_bytes(job)
    gemms = (
        gemm_seconds(rows, vocab, model.hidden, job, c)
        + gemm_seconds(rows, model.hidden, vocab, job, c)
        + gemm_seconds(vocab, model.hidden, rows, job, c)
    )
    passes = (
        36 if job.software == "megatron-2021" else 12
    )  # logits to float32, maximum, exponentials, gradients
    return gemms + passes * rows * vocab / bandwidth, 20 * rows * model.hidden / bandwidth


def step_time(job: Job, layout: Layout, c: Constants) -> StepTime:
    model, hardware, old = job.model, job.hardware, job.software == "megatron-2021"
    m, p, v = layout.micro_batches, layout.pp, layout.interleave
    one = block(job, layout, c)
    layers = model.layers / p
    fullest = layout.blocks(model)
    again = {"none": 0.0, "selective": one.core if old else 0.0, "full": one.forward}[
        layout.recompute
    ]
    again_exposed = one.forward_exposed if layout.recompute == "full" else 0.0
    tp_block = one.forward_exposed + one.backward_exposed + again_exposed
    tp_hidden_block = (6 if layout.recompute == "full" else 4) * one.reduce - tp_block
    head, embedding = head_seconds(job, layout, c)
    head_reduce = 2 * one.reduce if layout.tp > 1 else 0.0

    per_block = one.forward + one.backward + again + tp_block
    first, last = embedding + head_reduce / 2, head + head_reduce / 2
    wire = (
        hardware.network.bus_bytes_per_s * c.network
        if layout.crosses("pp", hardware)
        else hardware.link.bus_bytes_per_s * c.link
    )
    sends = 0.0 if p == 1 else 2 * v * (c.send + message_bytes(job, layout) / layout.tp / wire)
    stage = fullest * per_block
    slowest = stage + (max(first, last) if p > 1 else first + last) + sends
    total = model.layers * per_block + first + last + p * sends
    # 1F1B: all micro-batches through the slowest stage, the others' passes of one micro-batch before and after, 1/v of them interleaved.
    pipeline = m * slowest + (total - slowest) / v
    compute = m * (model.layers * (one.forward + one.backward) + head + embedding) / p
    recompute = m * layers * again
    tp_exposed = m * (model.layers * tp_block + head_reduce) / p
    pp_exposed = m * sends
    bubble = 0.0 if p == 1 else max(0.0, pipeline - compute - recompute - tp_exposed - pp_exposed)

    dp_all, dp_hidden = data_parallel_seconds(job, layout, c, compute)
    local = local_parameters(job.model, layout)
    shared = local / (layout.dp if layout.zero else 1)
    optimizer = c.update * shared / (c.memory * hardware.memory_bytes_per_s) + c.step
    return StepTime(
        compute,
        recompute,
        tp_exposed,
        m * layers * tp_hidden_block,
        pp_exposed,
        bubble,
        dp_all - dp_hidden,
        dp_hidden,
        optimizer,
    )


def data_parallel_seconds(
    job: Job, layout: Layout, c: Constants, compute: float
) -> tuple[float, float]:
    """(all, hidden) of the data-parallel collectives of a step."""
    hardware, dp, m = job.hardware, layout.dp, layout.micro_batches
    if dp == 1:
        return 0.0, 0.0
    bus = hardware.link.bus_bytes_per_s * c.link
    if layout.crosses("dp", hardware):
        per_node = max(1, hardware.gpus_per_node // layout.tp)  # of one data-parallel group
        bus = min(bus, per_node * hardware.network.bus_bytes_per_s * c.network)
    message = element_bytes(job) * local_parameters(job.model, layout)
    half = ring(
        message, dp, 1, bus, c
    )  # a reduce-scatter of gradients, or an all-gather of parameters
    total = {0: ring(message, dp, 2, bus, c), 1: 2 * half, 2: (m + 1) * half, 3: 3 * m * half}[
        layout.zero
    ]
    if job.software == "megatron-2021":
        return total, 0.0
    # Under the backward pass of the last micro-batch, two thirds of its compute; ZeRO-2 sends under every one, ZeRO-3 under the forward too.
    window = compute * {3: 1, 2: 2 / 3}.get(layout.zero, 2 / 3 / m)
    return total, min(total, window) * c.hidden
