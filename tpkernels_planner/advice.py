"""Sentences about a choice: bottlenecks, the TP size, TP against FSDP, the batch."""

from __future__ import annotations

from collections.abc import Callable

from .errors import PlanError
from .layout import Layout
from .search import LayoutChoice, Prediction, search, usable_bytes


def bottlenecks(row: Prediction, choice: LayoutChoice) -> str:
    """Name the largest cost other than compute, and faster layouts that memory rules out."""
    time = row.time
    layout = row.layout
    data_parallel = "the data-parallel collectives"
    if layout.gpus > row.job.hardware.gpus_per_node:
        data_parallel += " (the network)"
    costs = {
        "the TP all-reduces (the node's link)": time.tp_exposed,
        data_parallel: time.dp_exposed,
        "the pipeline (its bubble and sends; a larger batch fills it)": (
            time.bubble + time.pp_exposed
        ),
        "recomputation (memory)": time.recompute,
        "the optimizer's step": time.optimizer,
    }
    name, seconds = max(costs.items(), key=lambda item: item[1])
    text = f"computing takes {time.compute / time.total:.0%} of the step"
    if seconds > 0.01 * time.total:
        text += f"; what binds most beside it is {name}: {seconds / time.total:.0%}"
    faster = [other for other in choice.too_large if other.step_s < 0.97 * row.step_s]
    if faster:
        best = min(faster, key=lambda other: other.step_s)
        text += (
            f". Memory binds: {best.layout.words()} would take {best.step_s / row.step_s:.2f}x of "
            f"the time, but {best.memory.total / 1e9:.0f} GB of the "
            f"{usable_bytes(row.job) / 1e9:.0f} GB that may be used"
        )
    if layout.micro_batches < layout.pp * 4 and layout.pp > 1:
        text += f". The batch binds: {layout.micro_batches} micro-batches for {layout.pp} stages"
    return text + "."


def where_tp_pays(choice: LayoutChoice) -> str:
    """Compare the fastest layouts of every TP size."""
    fastest: dict[int, Prediction] = {}
    for row in choice.rows:
        fastest.setdefault(row.layout.tp, row)
    sizes = sorted(fastest)
    best = min((fastest[tp] for tp in sizes), key=lambda row: row.step_s)
    line = ", ".join(f"TP {tp} {fastest[tp].step_s / best.step_s:.2f}x" for tp in sizes)
    text = f"Step time by TP size, the best of each: {line}"
    missing = [str(tp) for tp in (1, 2, 4, 8) if tp < sizes[0]]
    if missing:
        text += f" (TP {', '.join(missing)} fits nowhere)"
    if sizes[-1] > best.layout.tp:
        text += f". TP stops paying after {best.layout.tp}"
    return text + "."


def tp_or_fsdp(choice: LayoutChoice) -> str:
    """Compare FSDP alone with TP and data parallelism."""
    fsdp = choice.first(lambda layout: layout.tp == 1 and layout.pp == 1 and layout.zero == 3)
    with_tp = choice.first(lambda layout: layout.tp > 1 and layout.pp == 1)
    if with_tp is None:
        if fsdp is None:
            return "Neither FSDP alone nor TP with data parallelism fits without a pipeline."
        return f"FSDP alone fits ({fsdp.step_s:.3g} s a step); TP does not."
    layout = with_tp.layout
    if fsdp is None:
        return (
            "FSDP alone (ZeRO-3, TP 1) does not fit or does not divide the batch; "
            f"TP does: {layout.words()}."
        )
    ratio = fsdp.step_s / with_tp.step_s
    winner = "they are even"
    if ratio > 1.01:
        winner = "TP is ahead"
    elif ratio < 0.99:
        winner = "FSDP is ahead"
    return (
        f"FSDP alone takes {fsdp.step_s:.3g} s a step, TP {layout.tp} with DP {layout.dp} "
        f"{with_tp.step_s:.3g} s: {winner} at this size."
    )


def _why_tp(choice: LayoutChoice) -> str:
    """Say why TP is needed, or return an empty text if a layout without it is as fast."""
    alone = choice.first(lambda layout: layout.tp == 1)
    if alone is None:
        return "nothing without it fits or divides the batch"
    if alone.step_s > 1.01 * choice.best.step_s:
        return f"it saves {1 - choice.best.step_s / alone.step_s:.0%}"
    return ""


def tp_needed_from(choice: LayoutChoice) -> str:
    """Find the number of GPUs from which on TP is needed for this batch.

    It is needed where the best layout without it is slower or does not exist.
    """
    sizes = [2**i for i in range(max(choice.gpus, 4096).bit_length())]
    needed = ""
    for size in sizes:
        try:
            found = search(choice.job, size, choice.global_batch, 1)
        except PlanError:
            continue
        why = _why_tp(found)
        if not why:
            needed = ""
        elif not needed:
            needed = f"{size} GPUs on ({why}; TP {found.tp})"
    if needed:
        return f"Without a pipeline, TP is needed from {needed}."
    return (
        f"Without a pipeline, TP is not needed for this batch on up to {sizes[-1]} GPUs: "
        "FSDP or DP is as fast."
    )


def batch_size(choice: LayoutChoice) -> str:
    """Say the smallest batch of the best layout's shape."""
    layout = choice.best.layout
    seq = choice.job.seq
    smallest = layout.dp * layout.micro_batch
    stages = f" x {layout.pp} stages" if layout.pp > 1 else ""
    return (
        f"{layout.gpus} GPUs = {layout.tp}-way TP{stages} x {layout.dp}-way DP: a step of at least "
        f"{smallest} sequences ({smallest * seq:,} tokens), here {layout.global_batch} in "
        f"{layout.micro_batches} passes; without TP it would be at least "
        f"{layout.gpus // layout.pp} sequences."
    )


def _best_other(choice: LayoutChoice, wanted: Callable[[Layout], bool]) -> str:
    """Describe the best layout among the wanted ones."""
    row = choice.first(wanted)
    if row is None:
        return "nothing fits."
    return f"the best is {row.layout.words()}: {row.step_s / choice.best.step_s:.2f}x of the time."


def advice(choice: LayoutChoice) -> list[str]:
    """Explain a choice in sentences.

    Example:
        >>> from tpkernels_planner import advice, plan
        >>> advice(plan("llama-7b", gpus=8, global_batch=64))[2]
        'FSDP alone takes 1.39 s a step, TP 2 with DP 4 1.39 s: they are even at this size.'
    """
    best = choice.best
    sentences = [
        f"Best: {best.layout.words()}, {best.tokens_per_s:,.0f} tokens/s: "
        + bottlenecks(best, choice),
        where_tp_pays(choice),
        tp_or_fsdp(choice),
        tp_needed_from(choice),
        batch_size(choice),
    ]
    if best.layout.sequence_parallel:
        other = _best_other(
            choice, lambda layout: not layout.sequence_parallel and layout.pp <= choice.pp
        )
        sentences.append(
            f"tpkernels does not run sequence parallelism (SP) yet; without it {other}"
        )
    if choice.pp > 1:
        other = _best_other(choice, lambda layout: layout.pp == 1)
        sentences.append(f"tpkernels has no pipeline of its own; without one {other}")
    return sentences
