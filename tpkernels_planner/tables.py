"""Predictions as tables of a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from rich import box
from rich.table import Table

from .collectives import traffic
from .search import Prediction

GB = 1e9
WIDE = 150  # columns of a terminal that holds all parts
PARTS = ("param.", "grad.", "optim.", "activ.", "compute", "TP", "hidden", "PP", "DP", "hidden")


def seconds_text(value: float) -> str:
    """Format seconds as s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _cells(row: Prediction, wide: bool) -> list[str]:
    """Format the cells of one prediction, with all parts in a wide table."""
    time = row.time
    memory = row.memory
    parts = {
        "compute": time.compute + time.recompute + time.optimizer,
        "tp": time.tp_exposed,
        "tp_hidden": time.tp_hidden,
        "pp": time.pp_exposed + time.bubble,
        "dp": time.dp_exposed,
        "dp_hidden": time.dp_hidden,
    }
    percent = {name: round(100 * part / time.total) for name, part in parts.items()}
    cells = [
        row.layout.words(),
        seconds_text(row.step_s),
        f"{row.mfu:.1%}",
        f"{memory.total / GB:.1f}",
    ]
    if not wide:
        shown = [value for name, value in percent.items() if "hidden" not in name]
        return [*cells, "/".join(map(str, shown))]
    uses = (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
    cells += [f"{use / GB:.1f}" for use in uses]
    cells += [f"{value}%" for value in percent.values()]
    return [*cells, f"{row.tokens_per_s:,.0f}"]


def choice_table(rows: list[Prediction], title: str, width: int) -> Table:
    """Make a table with a line for every prediction.

    Args:
        rows: the predictions.
        title: the table's title.
        width: columns of the terminal; a narrow one gets totals in place of all parts.
    """
    wide = width >= WIDE
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("layout", min_width=20)
    parts = (*PARTS, "tokens/s") if wide else ("% compute/ TP/PP/DP",)
    for name in ("step", "MFU", "GB", *parts):
        table.add_column(name, justify="right", min_width=None if wide else min(len(name), 9))
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *_cells(row, wide))
    return table


def compare_table(rows: list[Prediction]) -> Table:
    """Make a table with a column for every prediction."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(row.layout.words(), justify="right")

    def line(name: str, values: Iterable[str]) -> None:
        table.add_row(name, *values)

    line("step", [seconds_text(row.step_s) for row in rows])
    line("tokens/s", [f"{row.tokens_per_s:,.0f}" for row in rows])
    line("TFLOP/s a GPU (MFU)", [f"{row.flops_per_gpu / 1e12:.3g} ({row.mfu:.1%})" for row in rows])
    for name in asdict(rows[0].time):
        times = [seconds_text(getattr(row.time, name)) for row in rows]
        line(f"  {name.replace('_', ' ')}", times)
    totals = [f"{row.memory.total / GB:.1f} GB" for row in rows]
    marks = ["" if row.fits else " (too much)" for row in rows]
    line("memory a GPU", map("".join, zip(totals, marks, strict=True)))
    for name in asdict(rows[0].memory):
        line(f"  {name}", [f"{getattr(row.memory, name) / GB:.2f} GB" for row in rows])
    _add_traffic(table, rows)
    return table


def _add_traffic(table: Table, rows: list[Prediction]) -> None:
    """Add a line for every collective that a layout has."""
    carried = [traffic(row.job, row.layout) for row in rows]
    for name in dict.fromkeys(key for each in carried for key in each):
        cells = []
        for each in carried:
            text = ""
            if name in each:
                text = f"{each[name].calls} x {each[name].bytes_each / 1e6:.1f} MB"
            cells.append(text)
        table.add_row(name, *cells)
