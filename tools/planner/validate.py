"""The validation report: every measured row against its prediction, its tables in docs/planner.md, a plot and a CSV beside it."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

from tools.doc_sections import fill
from tpkernels_planner.files import write_atomically
from tpkernels_planner.model import DATA, PlanError
from tpkernels_planner.report import pyplot, save
from tpkernels_planner.search import Row

from .fit import Measured, best_published, groups, published

Pairs = dict[str, list[tuple[Measured, Row]]]


def error_lines(found: Pairs) -> list[str]:
    lines = ["| rows | number | mean absolute error | bias | largest |", "|---|---|---|---|---|"]
    single = [pair for name, rows in found.items() if name.startswith("vTrain") for pair in rows]
    together = {
        "vTrain single node, held back": [pair for pair in single if pair[0].held],
        "vTrain single node, fitted to": [pair for pair in single if not pair[0].held],
        "published": [
            pair for name, rows in found.items() if not name.startswith("vTrain") for pair in rows
        ],
    }
    for name, rows in {**together, **dict(sorted(found.items()))}.items():
        e = [row.error(predicted) for row, predicted in rows]
        lines.append(
            f"| {name} | {len(e)} | {statistics.mean(map(abs, e)):.1%} | {statistics.mean(e):+.1%} | {max(e, key=abs):+.1%} |"
        )
    return lines


def published_lines() -> list[str]:
    lines = [
        "| row | layout | measured | predicted | error | memory | the planner's first of these rules | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in published():
        predicted, first = best_published(row)
        size = f"{row.job.model.parameters / 1e9:.3g}B"
        lines.append(
            f"| {row.group}, {size} | {predicted.layout.words()} | {row.seconds:.2f} s | {predicted.step_s:.2f} s | {row.error(predicted):+.1%} | "
            f"{predicted.memory.total / 1e9:.0f} GB | {first.layout.words()} | {max(0.0, predicted.step_s / first.step_s - 1):.1%} |"
        )
    return lines


def choices(found: Pairs) -> list[tuple[int, float]]:
    """Of every model and batch of the single node that was measured in several layouts: how many, and how much slower (measured) the
    layout is that the planner puts first than the fastest measured."""
    cases: dict = {}
    for row, predicted in (
        pair for name, rows in found.items() if name.startswith("vTrain") for pair in rows
    ):
        cases.setdefault((row.job, row.layout.gpus, row.layout.global_batch), []).append(
            (predicted.step_s, row.seconds)
        )
    lost = []
    for times in cases.values():
        if len(times) > 1:
            _, of_first = min(times)
            lost.append((len(times), of_first / min(seconds for _, seconds in times) - 1))
    return lost


def choice_lines(found: Pairs) -> list[str]:
    lost = choices(found)
    losses = [loss for _, loss in lost]
    right = sum(loss == 0 for loss in losses)
    near = sum(loss <= 0.03 for loss in losses)
    return [
        f"Of {len(lost)} models and batches that were measured in several layouts ({sum(n for n, _ in lost)} rows), the planner's first is the fastest measured in "
        f"{right}, within 3% of it in {near}; on average it is {statistics.mean(losses):.1%} slower than the fastest, at most {max(losses):.1%}."
    ]


def constants_lines() -> list[str]:
    fitted = json.loads((DATA / "fitted.json").read_text())["constants"]
    lines = [f"| constant | {' | '.join(fitted)} |", f"|---|{'---|' * len(fitted)}"]
    return lines + [
        f"| {name} | {' | '.join(f'{each[name]:.4g}' for each in fitted.values())} |"
        for name in next(iter(fitted.values()))
    ]


def print_errors() -> None:
    found = groups()
    print("\n".join([*error_lines(found), "", *published_lines(), "", *choice_lines(found)]))


def write_rows(found: Pairs, path: Path) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["group", "hidden", "blocks", "layout", "batch", "measured_s", "predicted_s", "error"]
    )
    for group, rows in found.items():
        for row, predicted in rows:
            sizes = [
                row.job.model.hidden,
                row.job.model.layers,
                predicted.layout.words(),
                row.layout.global_batch,
            ]
            lines.writerow(
                [
                    group,
                    *sizes,
                    f"{row.seconds:.4f}",
                    f"{predicted.step_s:.4f}",
                    f"{row.error(predicted):+.4f}",
                ]
            )
    write_atomically(path, text.getvalue())


def draw(found: Pairs, path: Path) -> None:
    figure, axis = pyplot(path).subplots(figsize=(6, 6))
    together: Pairs = {}
    for name, rows in sorted(found.items(), reverse=True):
        together.setdefault(
            f"vTrain, {name.rpartition(', ')[2]}" if name.startswith("vTrain") else name, []
        ).extend(rows)
    for name, rows in together.items():
        style = "." if name.startswith("vTrain") else "D"
        axis.loglog(
            [row.seconds for row, _ in rows],
            [row.step_s for _, row in rows],
            style,
            markersize=4,
            label=name,
        )
    ends = [0.05, 200]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.fill_between(
        ends,
        [0.9 * end for end in ends],
        [1.1 * end for end in ends],
        color="gray",
        alpha=0.2,
        label="10%",
    )
    axis.set_xlabel("measured, seconds a step")
    axis.set_ylabel("predicted")
    axis.legend(fontsize=7)
    save(figure, path)


def write_page(page: Path) -> None:
    """Fills the page's sections `<!-- name -->` to `<!-- /name -->`; draws images/planner.png and writes planner-rows.csv beside it."""
    found, text = groups(), page.read_text()
    sections = {
        "errors": error_lines(found),
        "published": published_lines(),
        "choices": choice_lines(found),
        "constants": constants_lines(),
    }
    if missing := [name for name in sections if f"<!-- {name} -->" not in text]:
        raise PlanError(
            f"{page} has no section <!-- {missing[0]} --> ... <!-- /{missing[0]} --> to fill"
        )
    write_rows(found, page.with_name("planner-rows.csv"))
    (page.parent / "images").mkdir(exist_ok=True)
    draw(found, page.parent / "images" / "planner.png")
    write_atomically(page, fill(text, {name: [*lines, ""] for name, lines in sections.items()}))
