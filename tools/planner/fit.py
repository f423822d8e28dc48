"""Fits the constants of `time.Constants` to measured steps, and holds every measured row against its prediction.

`tpkernels plan fit` makes data/fitted.json; `tpkernels plan validate` makes the tables and the plot of docs/planner.md.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from tpkernels_planner.files import write_atomically
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.layout import Job, Layout
from tpkernels_planner.model import DATA, Model, PlanError
from tpkernels_planner.search import Row, hardware_share, layouts, predict, row_of, search
from tpkernels_planner.time import Constants, constants_of

MEASURED = Path(__file__).parent / "measured"
COMMAND = "tpkernels plan fit"
# First guess and bounds. hidden is not in the data, where nothing overlapped; 0.8 is what benchmarks/bench_link.py hides on CPUs.
START = {
    "gemm": (0.75, 0.5, 0.9),
    "attention": (0.6, 0.2, 0.85),
    "tail": (0.5, 0.1, 3),
    "memory": (0.8, 0.4, 0.95),
    "host": (6e-4, 1e-4, 2e-3),
    "skew": (0.3, 1e-3, 2),
    "link": (0.8, 0.3, 1),
    "network": (0.6, 0.2, 1),
    "reduce": (2e-5, 1e-7, 2e-4),
    "send": (2e-5, 1e-7, 1e-3),
    "update": (36, 8, 80),
    "step": (3e-3, 1e-4, 2e-2),
}
HIDDEN = 0.8
PUBLISHED_WEIGHT = 5.0  # of a published row beside one of the single node's


@dataclass(frozen=True)
class Measured:
    """One measured step. `held`: not fitted to. `open`: the source does not say its micro-batch, interleaving and recomputation, for
    which the fastest that fits are taken."""

    group: str
    job: Job
    layout: Layout
    seconds: float
    held: bool = False
    open: bool = False

    def predict(self, constants: Constants | None = None) -> Row:
        if not self.open:
            return predict(self.job, self.layout, constants)
        constants = constants or constants_of(self.job.hardware)
        sizes = (self.layout.tp, self.layout.pp, self.layout.dp)
        found = [
            row_of(self.job, layout, constants)
            for layout in layouts(self.job, self.layout.gpus, self.layout.global_batch)
            if (layout.tp, layout.pp, layout.dp) == sizes and layout.zero <= 1
        ]
        return min((row for row in found if row.fits), key=lambda row: row.step_s)

    def error(self, predicted: Row) -> float:
        """Predicted over measured, less one."""
        return predicted.step_s / self.seconds - 1


def single_node() -> list[Measured]:
    """vtrain_single_node.csv; a fifth of it, drawn by a hash of the row's sizes, is held back."""
    gpu, rows = load_hardware("a100-80"), []
    with (MEASURED / "vtrain_single_node.csv").open(encoding="utf-8-sig", newline="") as file:
        for line in list(csv.reader(file))[1:]:
            gpus, batch, micro, hidden, heads, layers, seq, tp, dp, pp = map(int, line[:10])
            model = Model(hidden, layers, heads, 51200, positions=seq, tied=True)
            layout = Layout(tp, pp, dp, micro, batch, recompute="full")
            held = int(hashlib.sha256(",".join(line[:10]).encode()).hexdigest(), 16) % 5 == 0
            group = f"vTrain, {gpus} GPUs, {'held back' if held else 'fitted to'}"
            rows.append(
                Measured(
                    group,
                    Job(model, gpu, seq, "float16", "megatron-2021"),
                    layout,
                    float(line[10]) / 1e3,
                    held,
                )
            )
    return rows


def published() -> list[Measured]:
    """published_rows.csv."""
    rows = []
    with (MEASURED / "published_rows.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            model = Model(
                *(int(line[key]) for key in ("hidden", "layers", "heads", "vocab")),
                positions=int(line["seq"]),
                tied=True,
            )
            gpu, unsaid = load_hardware(line["gpu"].lower()), not line["micro_batch"]
            job = Job(model, gpu, int(line["seq"]), "bfloat16", gpu.software)
            layout = Layout(
                int(line["tp"]),
                int(line["pp"]),
                int(line["dp"]),
                int(line["micro_batch"] or 1),
                int(line["global_batch"]),
                int(line["interleave"] or 1),
                line["recompute"] or "none",
                line["sequence_parallel"] == "yes",
            )
            flops = layout.global_batch * model.step_flops(job.seq)
            if line["tflops_counts_recompute"] == "yes":
                flops *= hardware_share(job, layout)
            seconds = float(
                line["step_s"] or flops / (float(line["tflops_per_gpu"]) * 1e12 * layout.gpus)
            )
            rows.append(Measured(line["source"], job, layout, seconds, open=unsaid))
    return rows


def error(row: Measured, constants: Constants | None = None) -> float:
    return row.error(row.predict(constants))


def _solve(
    rows: list[tuple[Measured, float]],
    base: dict[str, float],
    free: dict[str, tuple[float, float, float]],
) -> dict[str, float]:
    """`base` with the `free` constants at the least squares of the rows' weighted log errors, large ones counted linearly."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise PlanError("fitting needs scipy: pip install 'tpkernels[plan]'") from None

    names = list(free)

    def constants(x) -> Constants:
        return Constants(
            **{**base, **{name: math.exp(value) for name, value in zip(names, x, strict=True)}}
        )

    def residuals(x) -> list[float]:
        c = constants(x)
        return [weight * math.log1p(error(row, c)) for row, weight in rows]

    start, low, high = ([math.log(free[name][i]) for name in names] for i in range(3))
    found = least_squares(
        residuals,
        start,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.05,
        diff_step=1e-4,
        max_nfev=60,
    )
    return {
        **base,
        **{
            name: float(f"{math.exp(value):.4g}")
            for name, value in zip(names, found.x, strict=True)
        },
    }


def measured_files() -> list[Path]:
    """The files that the constants depend on, by name."""
    files = [*(DATA / "measured").glob("*.csv"), *MEASURED.glob("*.csv")]
    return sorted(files, key=lambda path: path.name)


def fit() -> dict:
    """The contents of data/fitted.json."""
    said, unsaid = (
        [row for row in published() if row.open == is_open] for is_open in (False, True)
    )
    rows = [(row, 1.0) for row in single_node() if not row.held] + [
        (row, PUBLISHED_WEIGHT) for row in said
    ]
    a100 = _solve(rows, {"hidden": HIDDEN}, START)
    # Four rows fix two constants. Fused attention's share of an H100's peak, causal, is FlashAttention-2's (arXiv 2307.08691, section 4).
    h100 = _solve(
        [(row, 1.0) for row in unsaid],
        {**a100, "attention": 0.35},
        {name: START[name] for name in ("gemm", "network")},
    )
    return {
        "command": COMMAND,
        "data": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in measured_files()
        },
        "constants": {"a100-80": a100, "h100": h100},
    }


def write_fit() -> None:
    write_atomically(DATA / "fitted.json", json.dumps(fit(), indent=2) + "\n")
    constants_of.cache_clear()


def groups() -> dict[str, list[tuple[Measured, Row]]]:
    """Every measured row and its prediction, by group."""
    found = defaultdict(list)
    for row in single_node() + published():
        found[row.group].append((row, row.predict()))
    return dict(found)


def best_published(row: Measured) -> tuple[Row, Row]:
    """(the published layout, the planner's first of the same rules): TP, PP and DP free, the rest as published, where it is."""
    plan = search(row.job, row.layout.gpus, row.layout.global_batch)
    mine = row.predict()

    def rules(layout: Layout) -> Layout:
        return replace(layout, tp=1, pp=1, dp=1)

    return mine, plan.first(lambda layout: row.open or rules(layout) == rules(mine.layout)) or mine
