"""The best layouts of a job over the number of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import PlanError, whole_number
from .job import Job
from .layout import Layout
from .records import prediction_record
from .search import Prediction, search

KINDS: dict[str, Callable[[Layout], bool]] = {
    "best": lambda layout: True,
    "no TP, no pipeline (DP, FSDP)": lambda layout: layout.tp == 1 and layout.pp == 1,
    "TP with DP or FSDP": lambda layout: layout.tp > 1 and layout.pp == 1,
}


class SweepPoint(NamedTuple):
    """The fastest layout of every kind on a number of GPUs, or the reason why none fits."""

    gpus: int
    rows: dict[str, Prediction]
    error: str = ""

    def tokens_per_s(self, kind: str) -> float:
        """Return the tokens a second and GPU of a kind of layout."""
        return self.rows[kind].tokens_per_s / self.gpus

    def record(self) -> dict[str, Any]:
        """Return the point's numbers, for JSON."""
        if self.error:
            return {"gpus": self.gpus, "error": self.error}
        records = {kind: prediction_record(row) for kind, row in self.rows.items()}
        return {"gpus": self.gpus, **records}

    def text(self) -> str:
        """Format the point as a line."""
        if self.error:
            return f"{self.gpus:6} GPUs: {self.error}"
        text = "; ".join(f"{kind} {self.tokens_per_s(kind):,.0f}" for kind in self.rows)
        best = self.rows["best"].layout.words()
        return f"{self.gpus:6} GPUs, tokens/s a GPU: {text}   ({best})"


def _point(job: Job, gpus: int, global_batch: int, most_pp: int | None) -> SweepPoint:
    try:
        choice = search(job, gpus, global_batch, most_pp)
    except PlanError as error:
        return SweepPoint(gpus, {}, str(error))
    rows = {kind: choice.first(wanted) for kind, wanted in KINDS.items()}
    return SweepPoint(gpus, {kind: row for kind, row in rows.items() if row})


def sweep(job: Job, most_gpus: int, global_batch: int, most_pp: int | None) -> list[SweepPoint]:
    """Search the layouts on 1, 2, 4 ... `most_gpus` GPUs.

    Args:
        job: the job.
        most_gpus: most GPUs.
        global_batch: sequences of a step.
        most_pp: most pipeline stages; None: any.

    Raises:
        PlanError: nothing fits on any number of GPUs.
    """
    whole_number("gpus", most_gpus)
    sizes = [2**i for i in range(most_gpus.bit_length())]
    points = [_point(job, gpus, global_batch, most_pp) for gpus in sizes]
    if not any(point.rows for point in points):
        raise PlanError(f"no number of GPUs up to {most_gpus} fits: {points[-1].error}")
    return points
