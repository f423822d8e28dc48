"""What a plan means, in words: what binds, when TP is needed, where it stops paying, TP against FSDP, the batch."""

from __future__ import annotations

from .model import PlanError
from .search import FIT, LayoutChoice, Row, search


def binds(row: Row, plan: LayoutChoice) -> str:
    """What costs the most beside computing, and whether memory forbids what would be faster."""
    time, layout = row.time, row.layout
    costs = {
        "the TP all-reduces (the node's link)": time.tp_exposed,
        "the data-parallel collectives (the network)"
        if layout.gpus > row.job.hardware.gpus_per_node
        else "the data-parallel collectives": time.dp_exposed,
        "the pipeline (its bubble and sends; a larger batch fills it)": time.bubble
        + time.pp_exposed,
        "recomputation (memory)": time.recompute,
        "the optimizer's step": time.optimizer,
    }
    name, seconds = max(costs.items(), key=lambda item: item[1])
    text = f"computing takes {time.compute / time.total:.0%} of the step"
    if seconds > 0.01 * time.total:
        text += f"; what binds most beside it is {name}: {seconds / time.total:.0%}"
    faster = [r for r in plan.too_large if r.step_s < 0.97 * row.step_s]
    if faster:
        best = min(faster, key=lambda r: r.step_s)
        text += (
            f". Memory binds: {best.layout.words()} would take {best.step_s / row.step_s:.2f}x of the time, but "
            f"{best.memory.total / 1e9:.0f} GB of the {FIT * row.job.hardware.memory_bytes / 1e9:.0f} GB that may be used"
        )
    if layout.micro_batches < layout.pp * 4 and layout.pp > 1:
        text += f". The batch binds: {layout.micro_batches} micro-batches for {layout.pp} stages"
    return text + "."


def by_tp(plan: LayoutChoice) -> list[Row]:
    """The fastest row of every TP size."""
    sizes = sorted({row.layout.tp for row in plan.rows})
    return [plan.first(lambda layout, tp=tp: layout.tp == tp) for tp in sizes]


def where_tp_pays(plan: LayoutChoice) -> str:
    rows = by_tp(plan)
    best = min(rows, key=lambda row: row.step_s)
    line = ", ".join(f"TP {row.layout.tp} {row.step_s / best.step_s:.2f}x" for row in rows)
    missing = [tp for tp in (1, 2, 4, 8) if tp < rows[0].layout.tp]
    text = f"Step time by TP size, the best of each: {line}"
    if missing:
        text += f" (TP {', '.join(map(str, missing))} fits nowhere)"
    larger = [row for row in rows if row.layout.tp > best.layout.tp]
    if larger:
        text += f". TP stops paying after {best.layout.tp}"
    return text + "."


def tp_or_fsdp(plan: LayoutChoice) -> str:
    fsdp = plan.first(lambda layout: layout.tp == 1 and layout.pp == 1 and layout.zero == 3)
    plain = plan.first(lambda layout: layout.tp > 1 and layout.pp == 1)
    if fsdp is None and plain is None:
        return "Neither FSDP alone nor TP with data parallelism fits without a pipeline."
    if fsdp is None:
        return f"FSDP alone (ZeRO-3, TP 1) does not fit or does not divide the batch; TP does: {plain.layout.words()}."
    if plain is None:
        return f"FSDP alone fits ({fsdp.step_s:.3g} s a step); TP does not."
    ratio = fsdp.step_s / plain.step_s
    winner = "TP is ahead" if ratio > 1.01 else "FSDP is ahead" if ratio < 0.99 else "they are even"
    return f"FSDP alone takes {fsdp.step_s:.3g} s a step, TP {plain.layout.tp} with DP {plain.layout.dp} {plain.step_s:.3g} s: {winner} at this size."


def tp_needed_from(plan: LayoutChoice) -> str:
    """The number of GPUs from which on the best layout without TP is slower than with, or does not exist, for this batch."""
    sizes = [2**i for i in range(max(plan.gpus, 4096).bit_length())]
    needed = None
    for size in sizes:
        try:
            found = search(plan.job, size, plan.global_batch, 1)
        except PlanError:
            continue
        alone = found.first(lambda layout: layout.tp == 1)
        if alone is None or alone.step_s > 1.01 * found.best.step_s:
            why = (
                "nothing without it fits or divides the batch"
                if alone is None
                else f"it saves {1 - found.best.step_s / alone.step_s:.0%}"
            )
            needed = needed or (size, why, found.best.layout.tp)
        else:
            needed = None
    if needed is None:
        return (
            "Without a pipeline, TP is not needed for this batch on up to "
            + f"{sizes[-1]} GPUs: FSDP or DP is as fast."
        )
    return (
        f"Without a pipeline, TP is needed from {needed[0]} GPUs on ({needed[1]}; TP {needed[2]})."
    )


def the_batch(plan: LayoutChoice) -> str:
    layout, seq = plan.best.layout, plan.job.seq
    smallest = layout.dp * layout.micro_batch
    return (
        f"{layout.gpus} GPUs = {layout.tp}-way TP{f' x {layout.pp} stages' if layout.pp > 1 else ''} x {layout.dp}-way DP: a step of at least "
        f"{smallest} sequences ({smallest * seq:,} tokens), here {layout.global_batch} in {layout.micro_batches} passes; without TP it would be at least "
        f"{layout.gpus // layout.pp} sequences."
    )


def advice(plan: LayoutChoice) -> list[str]:
    words = [
        f"Best: {plan.best.layout.words()}, {plan.best.tokens_per_s:,.0f} tokens/s: "
        + binds(plan.best, plan),
        where_tp_pays(plan),
        tp_or_fsdp(plan),
        tp_needed_from(plan),
        the_batch(plan),
    ]
    if plan.best.layout.sequence_parallel:
        whole = plan.first(lambda layout: not layout.sequence_parallel and layout.pp <= plan.pp)
        words.append(
            "tpkernels does not run sequence parallelism (SP) yet; without it "
            + (
                f"the best is {whole.layout.words()}: {whole.step_s / plan.best.step_s:.2f}x of the time."
                if whole
                else "nothing fits."
            )
        )
    if plan.pp > 1:
        flat = plan.first(lambda layout: layout.pp == 1)
        words.append(
            "tpkernels has no pipeline of its own; without one "
            + (
                f"the best is {flat.layout.words()}: {flat.step_s / plan.best.step_s:.2f}x of the time."
                if flat
                else "nothing fits."
            )
        )
    return words
