"""The planner against measured steps, and the page that shows its errors."""

import hashlib
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tools.planner import fit, measured, validate
from tpkernels_planner.constants import Constants, constants_of
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.model import DATA

PAGE = Path(__file__).parents[2] / "docs" / "planner.md"


def test_measured_steps_are_predicted():
    single = measured.single_node()
    known = measured.published()
    assert len(single) == 1440 and len(known) == 14
    held = [abs(fit.prediction_error(row)) for row in single if row.held]
    assert 240 < len(held) < 336
    assert statistics.mean(held) <= 0.07
    assert statistics.mean(abs(fit.prediction_error(row)) for row in known) <= 0.10


def test_the_published_choice_of_tp_pp_dp_is_first_or_near():
    for row in measured.published():
        published, first = validate.best_published(row)
        assert published.step_s <= 1.03 * first.step_s, published.layout.words()


def test_the_planner_chooses_as_was_measured():
    losses = [loss for _, loss in validate.choices(measured.predicted_groups())]
    assert len(losses) == 144 and statistics.mean(losses) < 0.05


def test_the_fit_is_of_these_files():
    fitted = json.loads((DATA / "fitted.json").read_text())
    files = measured.measured_files()
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert digests == fitted["data"], f"run `{fitted['command']}`"


def test_a_fit_finds_the_constants_that_made_its_rows():
    pytest.importorskip("scipy", reason="fitting needs scipy")
    gpu = load_hardware("a100-80")
    true = constants_of(gpu)
    rows = list(measured.single_node()[::40])
    made = [
        (replace(row, seconds=row.predict(replace(true, gemm=0.7, host=5e-4)).step_s), 1.0)
        for row in rows
    ]
    found = fit.solve(made, asdict(true), {name: fit.START[name] for name in ("gemm", "host")})
    assert found["gemm"] == pytest.approx(0.7, rel=1e-2) and found["host"] == pytest.approx(
        5e-4, rel=1e-2
    )
    assert Constants(**found) == replace(true, gemm=found["gemm"], host=found["host"])


def test_the_page_shows_what_the_planner_says():
    page = PAGE.read_text()
    for line in [
        *validate.constants_lines(),
        *validate.published_lines(),
        *validate.choice_lines(measured.predicted_groups()),
    ]:
        assert line in page, "run `tpkernels plan validate --page docs/planner.md`"
