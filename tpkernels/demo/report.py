"""The demo's tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .model import PROMPT, console

MIB = 2**20


def print_report(result: dict[str, Any], heads: list[tuple[int, int]]) -> None:
    """Print the figures of `run_demo`.

    Args:
        result: the figures.
        heads: query and KV heads of each rank.
    """
    _print_shards(result, heads)
    _print_comparison(result)
    _print_losses(result)
    _print_communication(result)
    _print_times(result)


def _print_shards(result: dict[str, Any], heads: list[tuple[int, int]]) -> None:
    table = Table(title="How each module was sharded", title_justify="left")
    for column in ("parameter", "shape", "sharded by", "sizes on the ranks"):
        table.add_column(column)
    for row in result["split"]:
        table.add_row(
            row["parameter"],
            " x ".join(map(str, row["shape"])),
            row["split"],
            " + ".join(map(str, row["sizes"] or ())),
        )
    console.print(table)
    query, kv = (" + ".join(map(str, counts)) for counts in zip(*heads, strict=True))
    console.print(f"heads on the ranks: {query} query, {kv} KV")
    full = result["param_bytes_unsharded"]
    parts = [f"{b / MIB:.1f} MiB ({b / full:.1%})" for b in result["param_bytes"]]
    console.print(f"parameters: {', '.join(parts)} of {full / MIB:.1f} MiB\n")


def _print_comparison(result: dict[str, Any]) -> None:
    table = Table("", "measured", title="Against the unsharded model", title_justify="left")
    table.add_row(
        "largest logit difference",
        f"{result['max_logit_diff']:.1e}  (logits up to {result['max_logit']:.1f})",
    )
    table.add_row("loss, relative difference", f"{result['max_loss_rel_diff']:.1e}")
    table.add_row("gradients, largest relative difference", f"{result['max_grad_rel_diff']:.1e}")
    same = result["generated"] == result["reference_generated"]
    table.add_row(
        f"{len(result['generated'])} generated tokens", "the same" if same else "DIFFERENT"
    )
    console.print(table)
    if result["tp"] > 1:
        console.print(
            "Gradients: against the unsharded model with its loss in float64; its own float32 "
            f"log_softmax puts it {result['reference_grad_rel_error']:.1e} off."
        )
    console.print(f"[bold]{PROMPT}[/bold]{result['generated_text']}\n", highlight=False)


def _print_losses(result: dict[str, Any]) -> None:
    table = Table(
        "step",
        "sharded",
        "unsharded",
        "relative difference",
        title="Fine-tuning on the opening of Alice in Wonderland: loss",
        title_justify="left",
    )
    pairs = zip(result["losses"], result["reference_losses"], strict=True)
    for step, (loss, want) in enumerate(pairs):
        table.add_row(str(step), f"{loss:.6f}", f"{want:.6f}", f"{abs(loss - want) / want:.1e}")
    console.print(table)


def _print_communication(result: dict[str, Any]) -> None:
    forward = result["all_reduces_per_block_forward"]
    backward = result["all_reduces_per_block_backward"]
    table = Table(
        "collective",
        "in a step",
        "MB",
        title=f"Communication: {forward:g} all-reduces a block forward, {backward:g} backward",
        title_justify="left",
    )
    for tag, entry in result["collectives"].items():
        table.add_row(tag, str(entry["count"]), f"{entry['bytes'] / 1e6:.2f}")
    console.print(table)


def _print_times(result: dict[str, Any]) -> None:
    ranks = "1 rank" if result["tp"] == 1 else f"{result['tp']} ranks"
    table = Table(
        f"{result['tokens_per_step']} tokens a step",
        "seconds",
        title="Time of a training step, median",
        title_justify="left",
    )
    table.add_row(f"tpkernels, {ranks}", f"{result['seconds_per_step']:.2f}")
    table.add_row(
        f"unsharded model, one process on {result['machine']['cores']} cores",
        f"{result['reference_seconds_per_step']:.2f}",
    )
    dtensor = result["dtensor_seconds_per_step"]
    table.add_row(
        f"torch DTensor, {ranks}", result["dtensor_note"] if dtensor is None else f"{dtensor:.2f}"
    )
    console.print(table)
