"""Bytes of memory on the fullest GPU, by use."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .job import Job
from .layout import Layout
from .model import Model, ceil_div

# CUDA, NCCL's buffers, the libraries' workspaces and the allocator's losses.
CONTEXT = 3 * 2**29
GRADIENT = 4  # bytes; gradients are summed in float32


@dataclass(frozen=True)
class Memory:
    """Bytes of memory by use.

    Attributes:
        parameters, gradients: the model's own.
        optimizer: Adam's moments, and the float32 copy of 16-bit parameters.
        activations: tensors that the forward pass keeps for the backward pass.
        workspace: libraries, and the parameters that ZeRO-3 gathers.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of all uses."""
        return sum(asdict(self).values())


def block_shard_parameters(model: Model, tp: int) -> int:
    """Count one block's parameters on the largest of `tp` ranks, which keeps whole norms."""
    shards = (linear.shard(tp) for linear in model.linears.values())
    return model.norm_parameters + sum(shard.parameters for shard in shards)


def local_parameters(model: Model, layout: Layout) -> int:
    """Count the parameters of the fullest stage's largest rank, before ZeRO shards them.

    The first stage and the last both keep a tied embedding.
    """
    blocks = layout.blocks(model) * block_shard_parameters(model, layout.tp)
    embedding = ceil_div(model.vocab, layout.tp) * model.hidden
    first = embedding + model.positions * model.hidden
    last = model.final_norm_parameters
    if layout.pp > 1:
        return blocks + max(first, last + embedding) + model.extra
    if not model.tied:
        last += embedding
    return blocks + first + last + model.extra


def optimizer_bytes(job: Job) -> int:
    """Return Adam's bytes a parameter: two float32 moments, and a 16-bit one's float32 copy."""
    return 8 if job.element_bytes == 4 else 12


def all_reduce_bytes(job: Job, layout: Layout) -> int:
    """Return the bytes of one TP all-reduce: a micro-batch's activations between blocks."""
    return job.element_bytes * layout.micro_batch * job.seq * job.model.hidden


def block_activations(job: Job, layout: Layout) -> int:
    """Return the bytes that one block keeps of a micro-batch for its backward pass.

    megatron-2021: sbh (10 + 24 / t) + 5 a s^2 b / t bytes with 16-bit elements (Korthikanti et al.,
    arXiv 2205.05198, equations 2 and 4), written out by features. Sequence parallelism divides the
    first term by t too. Selective recomputation removes the last.

    tpkernels: the norms' inputs and outputs, q, k, v, attention's output and log-sum-exp, the MLP's
    pre-activations and activations.
    """
    model = job.model
    tp = layout.tp
    element = job.element_bytes
    if layout.recompute == "full":
        return all_reduce_bytes(job, layout)
    shards = [linear.shard(tp) for linear in model.linears.values()]
    sharded = sum(s.out_features if s.style == "colwise" else s.in_features for s in shards)
    heads = ceil_div(model.heads, tp)
    unsharded = 4 * element * model.hidden
    if job.is_megatron:
        unsharded += 2 * model.hidden  # dropout's masks
        scores = (2 * element + 1) * heads * job.seq
        rest = 0 if layout.recompute == "selective" else scores
    else:
        rest = 4 * heads
    if layout.sequence_parallel:
        unsharded //= tp
    return layout.micro_batch * job.seq * (unsharded + sharded * element + rest)


def in_flight(layout: Layout) -> float:
    """Count the micro-batches whose activations the first stage holds at once under 1F1B.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2, interleaved stages included.
    """
    p = layout.pp
    v = layout.interleave
    m = layout.micro_batches
    return min(m, p) if v == 1 else min(m, p + (p - 1) / v)


def _activations(job: Job, layout: Layout) -> int:
    """Return the bytes of the activations of the fullest of the first stage and the last."""
    model = job.model
    rows = layout.micro_batch * job.seq
    held = layout.blocks(model) * block_activations(job, layout)
    recomputed = 0  # the block that is being recomputed
    if layout.recompute == "full":
        recomputed = block_activations(job, replace(layout, recompute="none"))
    # The input of the last norm, and of the output layer with its logits. The fused loss keeps
    # the gradient of its input instead, and no logits.
    output = 2 * model.hidden * job.element_bytes
    if job.is_megatron:
        output += ceil_div(model.vocab, layout.tp) * (4 + job.element_bytes)
    first = in_flight(layout) * held + recomputed
    last = held + recomputed + rows * output
    return int(max(first, last))


def memory(job: Job, layout: Layout) -> Memory:
    """Predict the memory of the fullest GPU."""
    model = job.model
    element = job.element_bytes
    workspace = CONTEXT if job.hardware.multiprocessors > 1 else 0
    if layout.zero == 3 and layout.dp > 1:
        # Two gathered blocks, or the gathered embedding.
        blocks = 2 * block_shard_parameters(model, layout.tp)
        workspace += element * max(blocks, ceil_div(model.vocab, layout.tp) * model.hidden)
    parameters = local_parameters(model, layout)

    def shard_bytes(each: int, stage: int) -> int:
        """Bytes of `each` a parameter, which ZeRO shards from `stage` on."""
        return ceil_div(parameters * each, layout.dp if layout.zero >= stage else 1)

    return Memory(
        parameters=shard_bytes(element, 3),
        gradients=shard_bytes(GRADIENT, 2),
        optimizer=shard_bytes(optimizer_bytes(job), 1),
        activations=_activations(job, layout),
        workspace=workspace,
    )
