"""The pictures of docs/performance.md and of the README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from formatting import size, tokens
from results import PARTS, STEPS, Contenders, Found, Points, series

matplotlib.use("svg")  # before pyplot is imported

import matplotlib.pyplot as plt

COLOURS = {
    "tpkernels": "black",
    "torch": "tab:blue",
    "torch.compile": "tab:cyan",
    "DTensor": "tab:orange",
    "megatron-core": "tab:green",
    "fairscale": "tab:purple",
    "vLLM": "tab:red",
    "DeepSpeed": "tab:brown",
    "OpenMPI": "tab:pink",
    "one process": "tab:gray",
}
# Colour, line style and label of each part of a layer's time.
PART_LOOKS = {
    "GEMM": ("tab:blue", "-", "GEMM"),
    "all-reduce": ("tab:red", "-", "all-reduce"),
    "serial": ("tab:gray", "-", "serial"),
    "overlapped": ("black", "-", "overlapped"),
    "ideal": ("tab:green", "--", "ideal: max(GEMM, all-reduce)"),
}
README_CASE: dict[str, Any] = dict(ranks=2, mode="training", tokens=512)
README_PEERS = ("tpkernels", "DTensor", "megatron-core", "fairscale")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tpkernels",
    "font.size": 8,
    "legend.frameon": False,
}


class Line(NamedTuple):
    xs: list[float]
    ys: list[float]
    style: dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """Line charts of one benchmark, a panel for each group of cases that `series` gives.

    Attributes:
        name: the benchmark's.
        axis: the parameter on the x axis.
        labels: of the x and the y axis.
        lines: the lines of a panel, by label.
        y_scale: "log" or "linear".
    """

    name: str
    axis: str
    labels: tuple[str, str]
    lines: Callable[[Points], dict[str, Line]]
    y_scale: str = "log"


def by_contender(points: Points, value: Callable[[Contenders, str], float]) -> dict[str, Line]:
    """Returns a line for each contender."""
    lines: dict[str, Line] = {}
    for x, contenders in points:
        for name in contenders:
            if name in PARTS or name in STEPS:
                continue
            width = 2.0 if name == "tpkernels" else 1.0
            style: dict[str, Any] = dict(
                color=COLOURS.get(name, "tab:olive"), marker="o", linewidth=width
            )
            line = lines.setdefault(name, Line([], [], style))
            line.xs.append(x)
            line.ys.append(value(contenders, name))
    return lines


def microseconds(contenders: Contenders, name: str) -> float:
    return 1e6 * contenders[name]["median"]


def relative(contenders: Contenders, name: str) -> float:
    if name == "tpkernels":
        return 1.0
    return contenders["tpkernels"]["ratios"][name]["median"]


def by_part(points: Points) -> dict[str, Line]:
    """Returns a line for each part of tpkernels' time, in milliseconds."""
    lines: dict[str, Line] = {}
    for part, (colour, dash, label) in PART_LOOKS.items():
        line = Line([], [], dict(color=colour, linestyle=dash, marker="o"))
        for x, contenders in points:
            components = contenders["tpkernels"]["components"]
            if part in components:
                line.xs.append(x)
                line.ys.append(1e3 * components[part])
        if line.xs:
            lines[label] = line
    return lines


PICTURES = (
    Picture(
        "all_reduce",
        "bytes",
        ("all-reduce size", "time (µs)"),
        lambda points: by_contender(points, microseconds),
    ),
    *(
        Picture(
            name,
            "tokens",
            ("tokens", "time / tpkernels' time"),
            lambda points: by_contender(points, relative),
            "linear",
        )
        for name in ("mlp", "block")
    ),
    *(
        Picture(name, "tokens", ("tokens", "time (ms)"), by_part)
        for name in ("row_linear", "column_linear")
    ),
)


def draw(picture: Picture, found: Found, folder: Path) -> None:
    """Writes a picture, if its benchmark was measured."""
    panels = series(found, picture.name, picture.axis)
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False)
    handles: dict[str, Any] = {}
    for panel, (shared, points) in zip(axes.flat, panels.items(), strict=False):
        for label, (xs, ys, style) in picture.lines(points).items():
            handles.setdefault(label, panel.plot(xs, ys, markersize=3, **style)[0])
        values = [value for value, _ in points]
        ticks = [size(value) if picture.axis == "bytes" else f"{value:,}" for value in values]
        x_label, y_label = picture.labels
        panel.set(xscale="log", yscale=picture.y_scale, title=shared)
        panel.set(xlabel=x_label, ylabel=y_label)
        panel.set_xticks(values, ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    legend_rows = -(-len(handles) // (4 * columns))
    legend_columns = -(-len(handles) // legend_rows)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=legend_columns)
    figure.tight_layout(rect=(0, (0.18 * legend_rows + 0.05) / (3.1 * rows), 1, 1))
    save(figure, folder / f"{picture.name}.svg")


def save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})  # the same bytes from the same figures
    plt.close(figure)


def draw_readme(found: Found, path: Path) -> None:
    """Writes the README's bars: a block's training step, relative to tpkernels, for each dtype."""
    panels = {}
    for (name, params), contenders in found.items():
        of = dict(params)
        dtype = of.pop("dtype", None)
        if name == "block" and of == README_CASE:
            panels[dtype] = contenders
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7.2, 2.1), squeeze=False, sharex=True, sharey=True
    )
    longest = 0.0
    for panel, (dtype, contenders) in zip(axes.flat, panels.items(), strict=True):
        names = [name for name in README_PEERS if name in contenders]
        values = [relative(contenders, name) for name in names]
        colours = ["tab:blue" if name == "tpkernels" else "0.72" for name in names]
        bars = panel.barh(names, values, color=colours, height=0.68)
        panel.bar_label(bars, [f"{value:.2f}x" for value in values], padding=4, fontsize=10)
        panel.set_title(dtype, fontsize=10, loc="left", fontweight="bold")
        longest = max(longest, *values)
        panel.tick_params(left=False, labelsize=10, bottom=False, labelbottom=False)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0][0].set_xlim(0, 1.2 * longest)  # both axes are shared by the panels
    axes[0][0].invert_yaxis()  # tpkernels at the top
    figure.suptitle("Training step of a transformer block: time / tpkernels' time", fontsize=11)
    shape = f"{README_CASE['ranks']} ranks, {tokens(README_CASE['tokens'])}, hidden size 1,024"
    figure.supxlabel(f"{shape}; shorter is better", fontsize=9, color="0.35")
    figure.tight_layout()
    save(figure, path)


def draw_all(found: Found, folder: Path) -> None:
    matplotlib.rcParams.update(STYLE)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        draw(picture, found, folder)
    draw_readme(found, folder / "readme.svg")
