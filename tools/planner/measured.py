"""Measured training steps, and the planner's predictions of them."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tpkernels_planner.constants import Constants, constants_of
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.job import Job
from tpkernels_planner.layout import Layout
from tpkernels_planner.model import DATA, Model
from tpkernels_planner.search import (
    Prediction,
    hardware_share,
    layouts,
    predict,
    predict_unchecked,
)

MEASURED = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Measured:
    """One measured step.

    Attributes:
        group: the rows that it is counted with.
        job, layout: the job and its layout.
        seconds: the measured step time.
        held: the fit does not use it.
        open: its source does not say the micro-batch, interleaving and recomputation; `predict`
            takes the fastest that fit.
    """

    group: str
    job: Job
    layout: Layout
    seconds: float
    held: bool = False
    open: bool = False

    @property
    def is_single_node(self) -> bool:
        """The row is one of vTrain's single node."""
        return self.group.startswith("vTrain")

    def predict(self, constants: Constants | None = None) -> Prediction:
        """Predict the step, with other constants than the GPU's own if given."""
        if not self.open:
            return predict(self.job, self.layout, constants)
        constants = constants or constants_of(self.job.hardware)
        sizes = (self.layout.tp, self.layout.pp, self.layout.dp)
        rows = [
            predict_unchecked(self.job, layout, constants)
            for layout in layouts(self.job, self.layout.gpus, self.layout.global_batch)
            if (layout.tp, layout.pp, layout.dp) == sizes and layout.zero <= 1
        ]
        return min((row for row in rows if row.fits), key=lambda row: row.step_s)

    def error(self, predicted: Prediction) -> float:
        """Return the relative error, predicted / measured - 1."""
        return predicted.step_s / self.seconds - 1


Pair = tuple[Measured, Prediction]


def measured_files() -> list[Path]:
    """List the files that the fitted constants depend on, by name."""
    files = [*(DATA / "measured").glob("*.csv"), *MEASURED.glob("*.csv")]
    return sorted(files, key=lambda path: path.name)


def single_node() -> list[Measured]:
    """Read vtrain_single_node.csv. A hash of a row's sizes draws the fifth that is held back."""
    gpu = load_hardware("a100-80")
    rows = []
    with (MEASURED / "vtrain_single_node.csv").open(encoding="utf-8-sig", newline="") as file:
        for line in list(csv.reader(file))[1:]:
            gpus, batch, micro, hidden, heads, layers, seq, tp, dp, pp = map(int, line[:10])
            model = Model(hidden, layers, heads, 51200, positions=seq, tied=True)
            held = int(hashlib.sha256(",".join(line[:10]).encode()).hexdigest(), 16) % 5 == 0
            rows.append(
                Measured(
                    f"vTrain, {gpus} GPUs, {'held back' if held else 'fitted to'}",
                    Job(model, gpu, seq, "float16", "megatron-2021"),
                    Layout(tp, pp, dp, micro, batch, recompute="full"),
                    float(line[10]) / 1e3,
                    held,
                )
            )
    return rows


def _published_row(line: dict[str, str]) -> Measured:
    """Read a line of published_rows.csv, which states seconds or FLOP/s."""
    seq = int(line["seq"])
    model = Model(
        hidden=int(line["hidden"]),
        layers=int(line["layers"]),
        heads=int(line["heads"]),
        vocab=int(line["vocab"]),
        positions=seq,
        tied=True,
    )
    gpu = load_hardware(line["gpu"].lower())
    job = Job(model, gpu, seq, "bfloat16", gpu.software)
    layout = Layout(
        tp=int(line["tp"]),
        pp=int(line["pp"]),
        dp=int(line["dp"]),
        micro_batch=int(line["micro_batch"] or 1),
        global_batch=int(line["global_batch"]),
        interleave=int(line["interleave"] or 1),
        recompute=line["recompute"] or "none",
        sequence_parallel=line["sequence_parallel"] == "yes",
    )
    if line["step_s"]:
        seconds = float(line["step_s"])
    else:
        flops = layout.global_batch * model.step_flops(seq)
        if line["tflops_counts_recompute"] == "yes":
            flops *= hardware_share(job, layout)
        seconds = flops / (float(line["tflops_per_gpu"]) * 1e12 * layout.gpus)
    return Measured(line["source"], job, layout, seconds, open=not line["micro_batch"])


def published() -> list[Measured]:
    """Read published_rows.csv."""
    with (MEASURED / "published_rows.csv").open(newline="") as file:
        return [_published_row(line) for line in csv.DictReader(file)]


def predicted_groups() -> dict[str, list[Pair]]:
    """Predict every measured row, by group."""
    found = defaultdict(list)
    for row in single_node() + published():
        found[row.group].append((row, row.predict()))
    return dict(found)
