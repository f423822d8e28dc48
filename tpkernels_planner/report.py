"""Plans as tables, JSON, arithmetic and pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from .files import replacing
from .memory import (
    GRADIENT,
    block_activations,
    element_bytes,
    in_flight,
    local_parameters,
    message_bytes,
    optimizer_bytes,
)
from .model import PlanError
from .search import LayoutChoice, Row
from .time import block, constants_of, data_parallel_seconds

GB = 1e9


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def traffic(row: Row) -> dict[str, dict]:
    """What each collective of one GPU's step carries: calls, bytes of the tensors, and over which link."""
    job, layout = row.job, row.layout
    model, m, hardware = job.model, layout.micro_batches, job.hardware
    message, local = (
        message_bytes(job, layout),
        element_bytes(job) * local_parameters(model, layout),
    )
    found = {}

    def add(kind: str, what: str, calls: int, size: int) -> None:
        link = hardware.network if layout.crosses(kind, hardware) else hardware.link
        found[f"{kind.upper()} {what}"] = {
            "calls": calls,
            "bytes_each": size,
            "bytes": calls * size,
            "link": link.kind,
        }

    if layout.tp > 1:
        calls = m * layout.blocks(model) * (6 if layout.recompute == "full" else 4)
        for what in (
            ("reduce-scatter", "all-gather") if layout.sequence_parallel else ("all-reduce",)
        ):
            add("tp", what, calls, message)
    if layout.pp > 1:
        add("pp", "send", 2 * m * layout.interleave, message // layout.tp)
    if layout.dp > 1 and layout.zero == 0:
        add("dp", "all-reduce of gradients", 1, local)
    elif layout.dp > 1:
        add("dp", "reduce-scatter of gradients", m if layout.zero > 1 else 1, local)
        add("dp", "all-gather of parameters", 2 * m if layout.zero == 3 else 1, local)
    return found


def as_dict(row: Row) -> dict:
    """For JSON. Seconds, bytes and FLOP/s."""
    layout, job = row.layout, row.job
    return {
        "model": {
            "name": job.model.name,
            "parameters": job.model.parameters,
            "flops_per_step": layout.global_batch * job.model.step_flops(job.seq),
        },
        "gpu": job.hardware.name,
        "gpus": layout.gpus,
        "seq": job.seq,
        "dtype": job.dtype,
        "software": job.software,
        "layout": asdict(layout),
        "step_s": row.step_s,
        "step_parts_s": asdict(row.time),
        "tokens_per_s": row.tokens_per_s,
        "tflops_per_gpu": row.flops_per_gpu / 1e12,
        "hardware_tflops_per_gpu": row.hardware_flops_per_gpu / 1e12,
        "mfu": row.mfu,
        "memory_bytes": row.memory.total,
        "memory_parts_bytes": asdict(row.memory),
        "fits": row.fits,
        "traffic": traffic(row),
    }


def plan_dict(plan: LayoutChoice, words: list[str], top: int) -> dict:
    return {
        "gpus": plan.gpus,
        "global_batch": plan.global_batch,
        "advice": words,
        "rows": [as_dict(row) for row in plan.rows[:top]],
    }


def plan_table(rows: list[Row], title: str, width: int) -> Table:
    """A line a row: all parts where the terminal is `width` wide enough for them, else the totals."""
    wide = width >= 150
    names = ["step", "MFU", "GB", "% compute/ TP/PP/DP"]
    if wide:
        names = [
            "step",
            "MFU",
            "GB",
            "param.",
            "grad.",
            "optim.",
            "activ.",
            "compute",
            "TP",
            "hidden",
            "PP",
            "DP",
            "hidden",
            "tokens/s",
        ]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("layout", min_width=20)
    for name in names:
        table.add_column(name, justify="right", min_width=None if wide else min(len(name), 9))
    for i, row in enumerate(rows, 1):
        t, m = row.time, row.memory
        parts = (
            t.compute + t.recompute + t.optimizer,
            t.tp_exposed,
            t.tp_hidden,
            t.pp_exposed + t.bubble,
            t.dp_exposed,
            t.dp_hidden,
        )
        compute, tp, tp_hidden, pp, dp, dp_hidden = (round(100 * part / t.total) for part in parts)
        cells = [
            str(i),
            row.layout.words(),
            seconds(row.step_s),
            f"{row.mfu:.1%}",
            f"{m.total / GB:.1f}",
        ]
        if wide:
            cells += [
                f"{part / GB:.1f}"
                for part in (m.parameters, m.gradients, m.optimizer, m.activations)
            ]
            cells += [f"{share}%" for share in (compute, tp, tp_hidden, pp, dp, dp_hidden)] + [
                f"{row.tokens_per_s:,.0f}"
            ]
        else:
            cells += [f"{compute}/{tp}/{pp}/{dp}"]
        table.add_row(*cells)
    return table


def compare_table(rows: list[Row]) -> Table:
    """Layouts side by side, a column each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(row.layout.words(), justify="right")

    def line(name: str, values) -> None:
        table.add_row(name, *values)

    line("step", [seconds(row.step_s) for row in rows])
    line("tokens/s", [f"{row.tokens_per_s:,.0f}" for row in rows])
    line("TFLOP/s a GPU (MFU)", [f"{row.flops_per_gpu / 1e12:.3g} ({row.mfu:.1%})" for row in rows])
    for name in asdict(rows[0].time):
        line(f"  {name.replace('_', ' ')}", [seconds(getattr(row.time, name)) for row in rows])
    line(
        "memory a GPU",
        [f"{row.memory.total / GB:.1f} GB" + ("" if row.fits else " (too much)") for row in rows],
    )
    for name in asdict(rows[0].memory):
        line(f"  {name}", [f"{getattr(row.memory, name) / GB:.2f} GB" for row in rows])
    carried = [traffic(row) for row in rows]
    for name in dict.fromkeys(key for each in carried for key in each):
        line(
            name,
            [
                f"{each[name]['calls']} x {each[name]['bytes_each'] / 1e6:.1f} MB"
                if name in each
                else ""
                for each in carried
            ],
        )
    return table


def explain(row: Row) -> str:
    """One row's arithmetic: every formula with its numbers and its source."""
    job, layout = row.job, row.layout
    model, hardware, c = job.model, job.hardware, constants_of(job.hardware)
    m, tp, pp, dp = layout.micro_batches, layout.tp, layout.pp, layout.dp
    one = block(job, layout, c)
    local = local_parameters(model, layout)
    t, held = row.time, row.memory
    flops = layout.global_batch * model.step_flops(job.seq)
    dp_all, _ = data_parallel_seconds(job, layout, c, t.compute)
    shown = [
        f"{layout.words()} of {model.name or 'the model'} on {layout.gpus} {hardware.title}, {layout.global_batch} sequences of {job.seq} tokens, {job.dtype}, {job.software}",
        "",
        "Model (counted from the configuration; tests hold it to the real modules)",
        f"  parameters = {model.layers} blocks x {model.block_parameters:,} + embeddings {model.embedding_parameters:,} + output {model.output_parameters:,} = {model.parameters:,}",
        f"  a step's FLOPs = 3 x 2 x tokens x (matrices + 2 s a d per block + V h) = {flops:.4g}   [Narayanan et al., arXiv 2104.04473, eq. 3]",
        "",
        "Memory of the fullest GPU",
        f"  its parameters = ceil({model.layers} / {pp}) blocks, matrices / {tp}, norms and row biases whole, + the table's share = {local:,}",
        f"  parameters: {element_bytes(job)} B each{f' / {dp}' if layout.zero > 2 else ''} = {held.parameters / GB:.2f} GB;  gradients: {GRADIENT} B{f' / {dp}' if layout.zero > 1 else ''} = {held.gradients / GB:.2f} GB;  "
        f"optimizer: {optimizer_bytes(job)} B{f' / {dp}' if layout.zero else ''} = {held.optimizer / GB:.2f} GB   [Rajbhandari et al., arXiv 1910.02054, section 3]",
        f"  activations: {block_activations(job, layout) / GB:.3f} GB a block and micro-batch x {layout.blocks(model)} blocks x {in_flight(layout):.3g} micro-batches in flight, + the last layer's = {held.activations / GB:.2f} GB   "
        "[Korthikanti et al., arXiv 2205.05198, eq. 2 and 4; Narayanan et al., section 2.2]",
        f"  workspace: {held.workspace / GB:.2f} GB (CUDA, NCCL, libraries; under ZeRO-3 what is gathered)",
        "",
        f"Time of a block, one micro-batch of {layout.micro_batch} x {job.seq} tokens",
        f"  GEMM [M,K]x[K,N] = (tiles of 128 x 128 / {hardware.multiprocessors} + {c.tail:.2f}) waves x 2 x 128^2 K / ({c.gemm:.2f} x {hardware.peak(job.dtype) / 1e12:.0f} TFLOP/s / {hardware.multiprocessors})   [waves: NVIDIA, Matrix Multiplication Background; constants fitted]",
        f"  between them: bytes / ({c.memory:.2f} x {hardware.memory_bytes_per_s / 1e9:.0f} GB/s); not less than the host's {seconds(c.host)} a forward pass, rounded off by a cubic mean   [fitted]",
        f"  forward {seconds(one.forward)}, backward {seconds(one.backward)}, attention's core {seconds(one.core)}",
    ]
    if tp > 1:
        shown.append(
            f"  TP all-reduce of {message_bytes(job, layout) / 1e6:.1f} MB: 2 ({tp} - 1) / {tp} x bytes / bus bandwidth at that size + {seconds(c.reduce)} = {seconds(one.reduce)}; two forward, two backward; "
            f"{seconds(one.forward_exposed + one.backward_exposed)} shown   [ring: nccl-tests PERFORMANCE.md; curve: data/measured/allreduce_busbw.csv]"
        )
    shown += [
        "",
        "Time of the step",
        f"  compute: {m} micro-batches x ({model.layers} blocks + output layer and embedding) / {pp} stages = {seconds(t.compute)};  again: {seconds(t.recompute)};  TP shown: {seconds(t.tp_exposed)}",
        f"  pipeline: {m} x the slowest stage + the other {pp - 1} stages' one micro-batch / {layout.interleave} - the above = bubble {seconds(t.bubble)};  sends {seconds(t.pp_exposed)}   [Narayanan et al., section 2.2]",
        f"  data parallel: {seconds(dp_all)} of which {seconds(t.dp_hidden)} under the backward pass;  optimizer: {c.update:.0f} B a parameter, and {seconds(c.step)} = {seconds(t.optimizer)}",
        f"  step = {seconds(t.total)};  MFU = {flops:.4g} / ({t.total:.4g} s x {layout.gpus} x {hardware.peak(job.dtype) / 1e12:.0f} TFLOP/s) = {row.mfu:.1%}",
    ]
    return "\n".join(shown)


def pyplot(path: Path):
    """matplotlib's, if it can draw that file.

    Raises:
        PlanError: matplotlib is not installed, or does not write such files.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlanError("pictures need matplotlib: pip install 'tpkernels[plan]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = pyplot.gcf().canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise PlanError(f"{path} is no picture that can be written: end it in .svg, .png or .pdf")
    return pyplot


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Stacked step times beside stacked memory, a bar a row."""
    figure, (left, right) = pyplot(path).subplots(
        1, 2, figsize=(12, 1.5 + 0.45 * len(rows)), sharey=True
    )
    names = [row.layout.words() for row in rows]
    for axis, parts, unit in (
        (left, [asdict(r.time) for r in rows], 1),
        (right, [asdict(r.memory) for r in rows], GB),
    ):
        start = [0.0] * len(rows)
        for key in parts[0]:
            if key.endswith("hidden"):
                continue
            widths = [part[key] / unit for part in parts]
            axis.barh(names, widths, left=start, label=key.replace("_", " "))
            start = [a + b for a, b in zip(start, widths, strict=True)]
        axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    left.invert_yaxis()
    left.set_xlabel("seconds a step")
    right.set_xlabel("GB a GPU")
    right.axvline(rows[0].job.hardware.memory_bytes / GB, color="black", linestyle=":")
    figure.suptitle(title, y=1.05)
    save(figure, path)


def draw_sweep(points: list[tuple[int, dict[str, float]]], path: Path, title: str) -> None:
    """Tokens a second and GPU, over GPUs, a line for each kind of layout."""
    figure, axis = pyplot(path).subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(key for _, each in points for key in each):
        line = [(gpus, each[name]) for gpus, each in points if name in each]
        axis.plot(*zip(*line, strict=True), marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens/s a GPU")
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.set_title(title, fontsize=9)
    save(figure, path)


def save(figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], bbox_inches="tight")
