"""Compare every measured row with its prediction: `tpkernels plan validate`."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tools.doc_sections import fill
from tools.planner.measured import Measured, Pair, predicted_groups, published
from tpkernels_planner.errors import PlanError
from tpkernels_planner.files import write_atomically
from tpkernels_planner.layout import Layout
from tpkernels_planner.model import DATA
from tpkernels_planner.pictures import pyplot, save
from tpkernels_planner.search import Prediction, search

Groups = dict[str, list[Pair]]


def best_published(row: Measured) -> tuple[Prediction, Prediction]:
    """Predict a published row's layout and the planner's choice by the same rules.

    Returns:
        The published layout's prediction, and that of the fastest layout with any TP, PP and DP
        whose other options are the published ones, as far as they are published.
    """
    choice = search(row.job, row.layout.gpus, row.layout.global_batch)
    own = row.predict()

    def rules(layout: Layout) -> Layout:
        return replace(layout, tp=1, pp=1, dp=1)

    first = choice.first(lambda layout: row.open or rules(layout) == rules(own.layout))
    return own, first or own


def error_lines(groups: Groups) -> list[str]:
    """Make the table of errors by group."""
    lines = ["| rows | number | mean absolute error | bias | largest |", "|---|---|---|---|---|"]
    every = [pair for rows in groups.values() for pair in rows]
    single = [pair for pair in every if pair[0].is_single_node]
    together = {
        "vTrain single node, held back": [pair for pair in single if pair[0].held],
        "vTrain single node, fitted to": [pair for pair in single if not pair[0].held],
        "published": [pair for pair in every if not pair[0].is_single_node],
    }
    for name, rows in {**together, **dict(sorted(groups.items()))}.items():
        errors = [row.error(predicted) for row, predicted in rows]
        lines.append(
            f"| {name} | {len(errors)} | {statistics.mean(map(abs, errors)):.1%} | "
            f"{statistics.mean(errors):+.1%} | {max(errors, key=abs):+.1%} |"
        )
    return lines


def published_lines() -> list[str]:
    """Make the table of published rows."""
    lines = [
        "| row | layout | measured | predicted | error | memory | "
        "the planner's first of these rules | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in published():
        predicted, first = best_published(row)
        gap = max(0.0, predicted.step_s / first.step_s - 1)
        lines.append(
            f"| {row.group}, {row.job.model.parameters / 1e9:.3g}B | {predicted.layout.words()} | "
            f"{row.seconds:.2f} s | {predicted.step_s:.2f} s | {row.error(predicted):+.1%} | "
            f"{predicted.memory.total / 1e9:.0f} GB | {first.layout.words()} | {gap:.1%} |"
        )
    return lines


def choices(groups: Groups) -> list[tuple[int, float]]:
    """Compare the planner's first layout with the fastest measured one.

    Returns:
        For every model and batch that a single node measured in several layouts: their number, and
        how much slower than the fastest the planner's first was measured.
    """
    cases = defaultdict(list)
    for rows in groups.values():
        for row, predicted in rows:
            if row.is_single_node:
                case = (row.job, row.layout.gpus, row.layout.global_batch)
                cases[case].append((predicted.step_s, row.seconds))
    losses = []
    for times in cases.values():
        if len(times) > 1:
            _, first = min(times)
            losses.append((len(times), first / min(seconds for _, seconds in times) - 1))
    return losses


def choice_lines(groups: Groups) -> list[str]:
    """Make the sentence about the planner's choices."""
    found = choices(groups)
    losses = [loss for _, loss in found]
    fastest = sum(loss == 0 for loss in losses)
    near = sum(loss <= 0.03 for loss in losses)
    return [
        f"Of {len(found)} models and batches that were measured in several layouts "
        f"({sum(number for number, _ in found)} rows), the planner's first is the fastest measured "
        f"in {fastest}, within 3% of it in {near}; on average it is {statistics.mean(losses):.1%} "
        f"slower than the fastest, at most {max(losses):.1%}."
    ]


def constants_lines() -> list[str]:
    """Make the table of fitted constants."""
    fitted = json.loads((DATA / "fitted.json").read_text())["constants"]
    lines = [f"| constant | {' | '.join(fitted)} |", f"|---|{'---|' * len(fitted)}"]
    for name in next(iter(fitted.values())):
        values = " | ".join(f"{constants[name]:.4g}" for constants in fitted.values())
        lines.append(f"| {name} | {values} |")
    return lines


def print_errors() -> None:
    """Print the tables of errors and published rows, and the sentence about choices."""
    groups = predicted_groups()
    print("\n".join([*error_lines(groups), "", *published_lines(), "", *choice_lines(groups)]))


def write_rows(groups: Groups, path: Path) -> None:
    """Write every row to a CSV file."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["group", "hidden", "blocks", "layout", "batch", "measured_s", "predicted_s", "error"]
    )
    for group, rows in groups.items():
        for row, predicted in rows:
            lines.writerow(
                [
                    group,
                    row.job.model.hidden,
                    row.job.model.layers,
                    predicted.layout.words(),
                    row.layout.global_batch,
                    f"{row.seconds:.4f}",
                    f"{predicted.step_s:.4f}",
                    f"{row.error(predicted):+.4f}",
                ]
            )
    write_atomically(path, text.getvalue())


def draw(groups: Groups, path: Path) -> None:
    """Draw predicted over measured step times."""
    figure, axis = pyplot(path).subplots(figsize=(6, 6))
    together: Groups = {}
    for name, rows in sorted(groups.items(), reverse=True):
        if rows[0][0].is_single_node:
            name = f"vTrain, {name.rpartition(', ')[2]}"
        together.setdefault(name, []).extend(rows)
    for name, rows in together.items():
        measured = [row.seconds for row, _ in rows]
        predicted = [row.step_s for _, row in rows]
        style = "." if rows[0][0].is_single_node else "D"
        axis.loglog(measured, predicted, style, markersize=4, label=name)
    ends = [0.05, 200]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    low, high = ([share * end for end in ends] for share in (0.9, 1.1))
    axis.fill_between(ends, low, high, color="gray", alpha=0.2, label="10%")
    axis.set_xlabel("measured, seconds a step")
    axis.set_ylabel("predicted")
    axis.legend(fontsize=7)
    save(figure, path)


def write_page(page: Path) -> None:
    """Fill a page's sections `<!-- name -->` to `<!-- /name -->`.

    The plot goes to images/planner.png beside the page, and every row to planner-rows.csv.

    Raises:
        PlanError: the page has no such section.
    """
    groups = predicted_groups()
    text = page.read_text()
    sections = {
        "errors": error_lines(groups),
        "published": published_lines(),
        "choices": choice_lines(groups),
        "constants": constants_lines(),
    }
    missing = [name for name in sections if f"<!-- {name} -->" not in text]
    if missing:
        raise PlanError(
            f"{page} has no section <!-- {missing[0]} --> ... <!-- /{missing[0]} --> to fill"
        )
    write_rows(groups, page.with_name("planner-rows.csv"))
    (page.parent / "images").mkdir(exist_ok=True)
    draw(groups, page.parent / "images" / "planner.png")
    write_atomically(page, fill(text, {name: [*lines, ""] for name, lines in sections.items()}))
