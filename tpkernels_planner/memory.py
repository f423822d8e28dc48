"""Bytes of memory on the fullest GPU, by what holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .layout import Job, Layout
from .model import Model, ceil_div

CONTEXT = (
    3 * 2**29
)  # what CUDA, NCCL's buffers and the libraries' workspaces take, and the allocator loses

GRADIENT = 4  # bytes: summed in float32


@dataclass(frozen=True)
class Memory:
    """Bytes. Parameters and gradients are the model's own; the optimizer's include the float32 copy of 16-bit parameters."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def block_share(model: Model, tp: int) -> int:
    """Parameters of one block on the largest of `tp` ranks: its matrices' parts and whole norms."""
    return (
        model.norms * model.norm * model.hidden
        + model.qk_norm
        + sum(linear.shard(tp).parameters for linear in model.linears.values())
    )


def local_parameters(model: Model, layout: Layout) -> int:
    """Of the fullest stage's largest rank, before ZeRO shares them out. A tied table is on the first stage and on the last."""
    blocks = layout.blocks(model) * block_share(model, layout.tp)
    table = ceil_div(model.vocab, layout.tp) * model.hidden
    first = table + model.positions * model.hidden
    last = model.final_norm * model.norm * model.hidden
    if layout.pp == 1:
        return blocks + first + last + (0 if model.tied else table) + model.extra
    return blocks + max(first, last + table) + model.extra


def element_bytes(job: Job) -> int:
    return 4 if job.dtype in ("float32", "tf32") else 2


def optimizer_bytes(job: Job) -> int:
    """Adam's, for a parameter: two moments in float32, and the float32 copy of a 16-bit one."""
    return 8 if element_bytes(job) == 4 else 12


def message_bytes(job: Job, layout: Layout) -> int:
    """Of a micro-batch between blocks: what a TP all-reduce sums."""
    return element_bytes(job) * layout.micro_batch * job.seq * job.model.hidden


def block_activations(job: Job, layout: Layout) -> int:
    """What one block keeps of a micro-batch for its backward pass, bytes.

    megatron-2021: sbh (10 + 24/t) + 5 a s^2 b / t of 16-bit elements (Korthikanti et al., arXiv 2205.05198, equations 2 and 4; the first
    term is divided by t too under sequence parallelism; the last is gone with selective recomputation), written out by features.
    tpkernels: the norms' inputs and outputs, q, k, v, attention's output and log-sum-exp, the MLP's pre-activations and activations.
    """
    model, tp, element = job.model, layout.tp, element_bytes(job)
    rows = layout.micro_batch * job.seq
    if layout.recompute == "full":
        return message_bytes(job, layout)
    shards = [linear.shard(tp) for linear in model.linears.values()]
    split = sum(shard.outputs if shard.split == "column" else shard.inputs for shard in shards)
    heads = ceil_div(model.heads, tp)
    whole = 4 * element * model.hidden
    if job.software == "megatron-2021":
        whole += 2 * model.hidden  # dropout's masks
        rest = 0 if layout.recompute == "selective" else (2 * element + 1) * heads * job.seq
    else:
        rest = 4 * heads
    return rows * (whole // (tp if layout.sequence_parallel else 1) + split * element + rest)


def in_flight(layout: Layout) -> float:
    """Micro-batches whose activations the first stage holds at once (1F1B; interleaved: Narayanan et al., arXiv 2104.04473, 2.2)."""
    p, v, m = layout.pp, layout.interleave, layout.micro_batches
    return min(m, p) if v == 1 else min(m, p + (p - 1) / v)


def memory(job: Job, layout: Layout) -> Memory:
    model, tp, dp, zero = job.model, layout.tp, layout.dp, layout.zero
    element, rows = element_bytes(job), layout.micro_batch * job.seq
    local = local_parameters(model, layout)
    one = block_activations(job, layout)
    held = layout.blocks(model) * one
    again = 0  # of the block that is being recomputed
    if layout.recompute == "full":
        again = block_activations(
            job,
            Layout(tp, sequence_parallel=layout.sequence_parallel, micro_batch=layout.micro_batch),
        )
    vocab = ceil_div(model.vocab, tp)
    # The last norm's input, and the output layer's with its logits; the fused loss keeps the gradient of its input instead, and no logits.
    last = rows * (
        2 * model.hidden * element
        + (vocab * (4 + element) if job.software == "megatron-2021" else 0)
    )
    activations = max(
        in_flight(layout) * held + again, held + again + last
    )  # of the first stage, the last
    workspace = CONTEXT if job.hardware.multiprocessors > 1 else 0
    if zero == 3 and dp > 1:  # two blocks gathered, or the table
        workspace += element * max(2 * block_share(model, tp), vocab * model.hidden)

    def shared(each: int, since: int) -> int:
        return ceil_div(local * each, dp if zero >= since else 1)

    return Memory(
        shared(element, 3),
        shared(GRADIENT, 2),
        shared(optimizer_bytes(job), 1),
        int(activations),
        workspace,
    )
