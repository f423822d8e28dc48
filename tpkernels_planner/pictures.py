"""Predictions as pictures, which need matplotlib."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import PlanError
from .files import replacing
from .search import Prediction
from .sweep import SweepPoint
from .tables import GB


def pyplot(path: Path) -> Any:
    """Import matplotlib's pyplot, if it can write such a file.

    Raises:
        PlanError: matplotlib is not installed, or does not write such files.
    """
    # matplotlib is optional and heavy.
    try:
        import matplotlib
    except ImportError:
        raise PlanError("pictures need matplotlib: pip install 'tpkernels[plan]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if path.suffix[1:] not in pyplot.gcf().canvas.get_supported_filetypes():
        raise PlanError(f"{path} is no picture that can be written: end it in .svg, .png or .pdf")
    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file."""
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:], bbox_inches="tight")


def _stack(axis: Any, names: list[str], parts: list[dict[str, float]], unit: float) -> None:
    """Draw a stacked bar for every name."""
    starts = [0.0] * len(names)
    for key in parts[0]:
        if key.endswith("hidden"):
            continue
        widths = [part[key] / unit for part in parts]
        axis.barh(names, widths, left=starts, label=key.replace("_", " "))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_rows(rows: list[Prediction], path: Path, title: str) -> None:
    """Draw the step time and the memory of every prediction by parts."""
    size = (12, 1.5 + 0.45 * len(rows))
    figure, (left, right) = pyplot(path).subplots(1, 2, figsize=size, sharey=True)
    names = [row.layout.words() for row in rows]
    _stack(left, names, [asdict(row.time) for row in rows], 1)
    _stack(right, names, [asdict(row.memory) for row in rows], GB)
    left.invert_yaxis()
    left.set_xlabel("seconds a step")
    right.set_xlabel("GB a GPU")
    right.axvline(rows[0].job.hardware.memory_bytes / GB, color="black", linestyle=":")
    figure.suptitle(title, y=1.05)
    save(figure, path)


def draw_sweep(points: list[SweepPoint], path: Path, title: str) -> None:
    """Draw tokens a second and GPU over the number of GPUs, a line for every kind of layout."""
    figure, axis = pyplot(path).subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(key for point in points for key in point.rows):
        line = [(point.gpus, point.tokens_per_s(name)) for point in points if name in point.rows]
        axis.plot(*zip(*line, strict=True), marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens/s a GPU")
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.set_title(title, fontsize=9)
    save(figure, path)
