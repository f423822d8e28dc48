"""Fit the constants of the time model to measured steps: `tpkernels plan fit`."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from tools.planner.measured import Measured, measured_files, published, single_node
from tpkernels_planner.constants import Constants, constants_of
from tpkernels_planner.errors import PlanError
from tpkernels_planner.files import write_atomically
from tpkernels_planner.model import DATA

# First guess, lower and upper bound of each constant.
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
# The data says nothing of `hidden`, because nothing overlapped there. benchmarks/bench_link.py
# hides this share on CPUs.
HIDDEN = 0.8
# FlashAttention-2's causal share of an H100's peak (arXiv 2307.08691, section 4). The four rows of
# H100s fix two constants, and this is not one of them.
H100_ATTENTION = 0.35
PUBLISHED_WEIGHT = 5.0  # weight of a published row; a single node's row has 1


def prediction_error(row: Measured, constants: Constants | None = None) -> float:
    """Return a row's relative error, predicted / measured - 1."""
    return row.error(row.predict(constants))


def solve(
    rows: list[tuple[Measured, float]],
    base: dict[str, float],
    free: dict[str, tuple[float, float, float]],
) -> dict[str, float]:
    """Fit constants by least squares of the rows' log errors; large errors count linearly.

    Args:
        rows: measured rows with their weights.
        base: the constants that stay as they are.
        free: the constants to fit, with their first guess and bounds.

    Returns:
        `base` with the fitted constants.

    Raises:
        PlanError: scipy is not installed.
    """
    try:  # scipy is optional and heavy
        from scipy.optimize import least_squares
    except ImportError:
        raise PlanError("fitting needs scipy: pip install 'tpkernels[plan]'") from None

    def with_logs(logs) -> dict[str, float]:
        return dict(zip(free, map(math.exp, logs), strict=True))

    def residuals(logs) -> list[float]:
        constants = Constants(**{**base, **with_logs(logs)})
        return [weight * math.log1p(prediction_error(row, constants)) for row, weight in rows]

    start, low, high = ([math.log(bounds[i]) for bounds in free.values()] for i in range(3))
    found = least_squares(
        residuals,
        start,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.05,
        diff_step=1e-4,
        max_nfev=60,
    )
    return {**base, **{name: float(f"{value:.4g}") for name, value in with_logs(found.x).items()}}


def fit() -> dict[str, Any]:
    """Return the contents of data/fitted.json."""
    rows = [(row, 1.0) for row in single_node() if not row.held]
    rows += [(row, PUBLISHED_WEIGHT) for row in published() if not row.open]
    a100 = solve(rows, {"hidden": HIDDEN}, START)
    h100 = solve(
        [(row, 1.0) for row in published() if row.open],
        {**a100, "attention": H100_ATTENTION},
        {name: START[name] for name in ("gemm", "network")},
    )
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in measured_files()
    }
    return {
        "command": "tpkernels plan fit",
        "data": digests,
        "constants": {"a100-80": a100, "h100": h100},
    }


def write_fit() -> None:
    """Fit the constants and write data/fitted.json."""
    write_atomically(DATA / "fitted.json", json.dumps(fit(), indent=2) + "\n")
    constants_of.cache_clear()
