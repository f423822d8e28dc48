"""The validation report: every measured row against its prediction, its tables in docs/planner.md, a plot and a CSV beside it."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from ..files import write_whole
from .fit import Measured, best_published, groups, published, single_node
from .model import DATA
from .report import pyplot, save
from .search import Row

Pairs = dict[str, list[tuple[Measured, Row]]]


def _errors(rows: list[tuple[Measured, Row]]) -> list[float]:
    return [predicted.step_s / row.seconds - 1 for row, predicted in rows]


def error_lines(found: Pairs) -> list[str]:
    lines = ["| rows | number | mean absolute error | bias | largest |", "|---|---|---|---|---|"]
    single = [pair for name, rows in found.items() if name.startswith("vTrain") for pair in rows]
    together = {
        "vTrain single node, held back": [pair for pair in single if pair[0].held],
        "vTrain single node, fitted to": [pair for pair in single if not pair[0].held],
        "published": [pair for name, rows in found.items() if not name.startswith("vTrain") for pair in rows],
    }
    for name, rows in {**together, **dict(sorted(found.items()))}.items():
        e = _errors(rows)
        lines.append(f"| {name} | {len(e)} | {statistics.mean(map(abs, e)):.1%} | {statistics.mean(e):+.1%} | {max(e, key=abs):+.1%} |")
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
            f"| {row.group}, {size} | {predicted.layout.words()} | {row.seconds:.2f} s | {predicted.step_s:.2f} s | {predicted.step_s / row.seconds - 1:+.1%} | "
            f"{predicted.memory.total / 1e9:.0f} GB | {first.layout.words()} | {max(0.0, predicted.step_s / first.step_s - 1):.1%} |"
        )
    return lines


def choices() -> list[tuple[int, float]]:
    """Of every model and batch of the single node that was measured in several layouts: how many, and how much slower (measured) the
    layout is that the planner puts first than the fastest measured."""
    cases: dict = {}
    for row in single_node():
        cases.setdefault((row.job, row.layout.gpus, row.layout.global_batch), []).append(row)
    found = []
    for rows in cases.values():
        if len(rows) > 1:
            first = min(rows, key=lambda row: row.predict().step_s)
            found.append((len(rows), first.seconds / min(row.seconds for row in rows) - 1))
    return found


def choice_lines() -> list[str]:
    found = choices()
    losses = [loss for _, loss in found]
    right = sum(loss == 0 for loss in losses)
    near = sum(loss <= 0.03 for loss in losses)
    return [
        f"Of {len(found)} models and batches that were measured in several layouts ({sum(n for n, _ in found)} rows), the planner's first is the fastest measured in "
        f"{right}, within 3% of it in {near}; on average it is {statistics.mean(losses):.1%} slower than the fastest, at most {max(losses):.1%}."
    ]


def constants_lines() -> list[str]:
    fitted = json.loads((DATA / "fitted.json").read_text())["constants"]
    lines = [f"| constant | {' | '.join(fitted)} |", f"|---|{'---|' * len(fitted)}"]
    return lines + [f"| {name} | {' | '.join(f'{each[name]:.4g}' for each in fitted.values())} |" for name in next(iter(fitted.values()))]


def print_errors() -> None:
    print("\n".join([*error_lines(groups()), "", *published_lines(), "", *choice_lines()]))


def write_rows(found: Pairs, path: Path) -> None:
    lines = ["group,hidden,blocks,layout,batch,measured_s,predicted_s,error"]
    for group, rows in found.items():
        for row, predicted in rows:
            model, words = row.job.model, predicted.layout.words()
            figures = f"{row.seconds:.4f},{predicted.step_s:.4f},{predicted.step_s / row.seconds - 1:+.4f}"
            lines.append(f'"{group}",{model.hidden},{model.layers},"{words}",{row.layout.global_batch},{figures}')
    write_whole(path, "\n".join(lines) + "\n")


def draw(found: Pairs, path: Path) -> None:
    figure, axis = pyplot(path).subplots(figsize=(6, 6))
    together: Pairs = {}
    for name, rows in sorted(found.items(), reverse=True):
        together.setdefault(f"vTrain, {name.rpartition(', ')[2]}" if name.startswith("vTrain") else name, []).extend(rows)
    for name, rows in together.items():
        style = "." if name.startswith("vTrain") else "D"
        axis.loglog([row.seconds for row, _ in rows], [row.step_s for _, row in rows], style, markersize=4, label=name)
    ends = [0.05, 200]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="gray", alpha=0.2, label="10%")
    axis.set_xlabel("measured, seconds a step")
    axis.set_ylabel("predicted")
    axis.legend(fontsize=7)
    save(figure, path)


def write_page(page: Path) -> None:
    """Fills the page's sections `<!-- name -->` to `<!-- /name -->`; draws images/planner.png and writes planner-rows.csv beside it."""
    found, text = groups(), page.read_text()
    sections = {"errors": error_lines(found), "published": published_lines(), "choices": choice_lines(), "constants": constants_lines()}
    for name, lines in sections.items():
        mark = f"<!-- {name} -->"
        assert mark in text, f"{page} has no section {mark}"
        text = re.sub(
            rf"{mark}.*<!-- /{name} -->", "\n".join([mark, "", *lines, "", f"<!-- /{name} -->"]).replace("\\", r"\\"), text, flags=re.S
        )
    write_rows(found, page.with_name("planner-rows.csv"))
    (page.parent / "images").mkdir(exist_ok=True)
    draw(found, page.parent / "images" / "planner.png")
    write_whole(page, text)
