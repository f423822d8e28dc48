"""The arithmetic of one prediction: every formula with its numbers and its source."""

from __future__ import annotations

from .block_time import block_time
from .collectives import data_parallel_seconds
from .constants import constants_of
from .memory import (
    GRADIENT,
    all_reduce_bytes,
    block_activations,
    in_flight,
    local_parameters,
    optimizer_bytes,
)
from .search import Prediction
from .tables import GB, seconds_text


def _model_lines(row: Prediction) -> list[str]:
    model = row.job.model
    return [
        "Model (counted from the configuration; tests hold it to the real modules)",
        f"  parameters = {model.layers} blocks x {model.block_parameters:,} "
        f"+ embeddings {model.embedding_parameters:,} "
        f"+ output {model.output_parameters:,} = {model.parameters:,}",
        "  a step's FLOPs = 3 x 2 x tokens x (matrices + 2 s a d per block + V h) = "
        f"{row.step_flops:.4g}   [Narayanan et al., arXiv 2104.04473, eq. 3]",
    ]


def _memory_lines(row: Prediction) -> list[str]:
    job = row.job
    layout = row.layout
    held = row.memory

    def shards(stage: int) -> str:
        return f" / {layout.dp}" if layout.zero >= stage else ""

    return [
        "Memory of the fullest GPU",
        f"  its parameters = ceil({job.model.layers} / {layout.pp}) blocks, matrices / {layout.tp},"
        f" norms and row biases whole, + the table's share = "
        f"{local_parameters(job.model, layout):,}",
        f"  parameters: {job.element_bytes} B each{shards(3)} = {held.parameters / GB:.2f} GB;  "
        f"gradients: {GRADIENT} B{shards(2)} = {held.gradients / GB:.2f} GB;  "
        f"optimizer: {optimizer_bytes(job)} B{shards(1)} = {held.optimizer / GB:.2f} GB   "
        "[Rajbhandari et al., arXiv 1910.02054, section 3]",
        f"  activations: {block_activations(job, layout) / GB:.3f} GB a block and micro-batch x "
        f"{layout.blocks(job.model)} blocks x {in_flight(layout):.3g} micro-batches in flight, "
        f"+ the last layer's = {held.activations / GB:.2f} GB   "
        "[Korthikanti et al., arXiv 2205.05198, eq. 2 and 4; Narayanan et al., section 2.2]",
        f"  workspace: {held.workspace / GB:.2f} GB (CUDA, NCCL, libraries; "
        "under ZeRO-3 what is gathered)",
    ]


def _block_lines(row: Prediction) -> list[str]:
    job = row.job
    layout = row.layout
    hardware = row.job.hardware
    c = constants_of(hardware)
    one = block_time(job, layout, c)
    processors = hardware.multiprocessors
    tp = layout.tp
    lines = [
        f"Time of a block, one micro-batch of {layout.micro_batch} x {job.seq} tokens",
        f"  GEMM [M,K]x[K,N] = (tiles of 128 x 128 / {processors} + {c.tail:.2f}) waves x "
        f"2 x 128^2 K / ({c.gemm:.2f} x {job.peak_flops_per_s / 1e12:.0f} TFLOP/s / {processors})"
        "   [waves: NVIDIA, Matrix Multiplication Background; constants fitted]",
        f"  between them: bytes / ({c.memory:.2f} x {hardware.memory_bytes_per_s / 1e9:.0f} GB/s); "
        f"not less than the host's {seconds_text(c.host)} a forward pass, "
        "rounded off by a cubic mean   [fitted]",
        f"  forward {seconds_text(one.forward)}, backward {seconds_text(one.backward)}, "
        f"attention's core {seconds_text(one.core)}",
    ]
    if tp > 1:
        lines.append(
            f"  TP all-reduce of {all_reduce_bytes(job, layout) / 1e6:.1f} MB: "
            f"2 ({tp} - 1) / {tp} x bytes / bus bandwidth at that size + {seconds_text(c.reduce)} "
            f"= {seconds_text(one.all_reduce)}; two forward, two backward; "
            f"{seconds_text(one.forward_exposed + one.backward_exposed)} shown   "
            "[ring: nccl-tests PERFORMANCE.md; curve: data/measured/allreduce_busbw.csv]"
        )
    return lines


def _step_lines(row: Prediction) -> list[str]:
    job = row.job
    layout = row.layout
    time = row.time
    m = layout.micro_batches
    pp = layout.pp
    c = constants_of(job.hardware)
    data_parallel, _ = data_parallel_seconds(job, layout, c, time.compute)
    return [
        "Time of the step",
        f"  compute: {m} micro-batches x ({job.model.layers} blocks + output layer and embedding) "
        f"/ {pp} stages = {seconds_text(time.compute)};  again: {seconds_text(time.recompute)};  "
        f"TP shown: {seconds_text(time.tp_exposed)}",
        f"  pipeline: {m} x the slowest stage + the other {pp - 1} stages' one micro-batch / "
        f"{layout.interleave} - the above = bubble {seconds_text(time.bubble)};  "
        f"sends {seconds_text(time.pp_exposed)}   [Narayanan et al., section 2.2]",
        f"  data parallel: {seconds_text(data_parallel)} of which {seconds_text(time.dp_hidden)} "
        f"under the backward pass;  optimizer: {c.update:.0f} B a parameter, "
        f"and {seconds_text(c.step)} = {seconds_text(time.optimizer)}",
        f"  step = {seconds_text(time.total)};  MFU = {row.step_flops:.4g} / ({time.total:.4g} s x "
        f"{layout.gpus} x {job.peak_flops_per_s / 1e12:.0f} TFLOP/s) = {row.mfu:.1%}",
    ]


def explain(row: Prediction) -> str:
    """Write out how a prediction was computed.

    Example:
        >>> from tpkernels_planner import plan
        >>> lines = explain(plan("llama-7b", gpus=8, global_batch=64).best).splitlines()
        >>> lines[3].partition(" = ")[2]
        '32 blocks x 202,383,360 + embeddings 131,072,000 + output 131,076,096 = 6,738,415,616'
    """
    job = row.job
    layout = row.layout
    title = (
        f"{layout.words()} of {job.model.name or 'the model'} on {layout.gpus} "
        f"{job.hardware.title}, {layout.global_batch} sequences of {job.seq} tokens, "
        f"{job.dtype}, {job.software}"
    )
    lines = [title]
    for section in (_model_lines, _memory_lines, _block_lines, _step_lines):
        lines += ["", *section(row)]
    return "\n".join(lines)
