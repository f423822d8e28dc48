"""`make gpu-day` without a GPU: all steps are listed, skips have a reason, the files are whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_day.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything: `make gpu-day` does")
def test_rehearsal(tmp_path):
    command = [sys.executable, SCRIPT, "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    day = json.loads((tmp_path / "gpu-day.json").read_text())
    steps = {step["name"]: step for step in day["steps"]}
    assert steps["environment"]["status"] == "passed"
    assert steps["environment"]["figures"]["torch"] == torch.__version__
    skipped = {
        name
        for name, step in steps.items()
        if step["status"] == "skipped" and ("GPU" in step["why"] or "CUDA" in step["why"])
    }
    assert skipped == steps.keys() - {"environment"}
    assert {"build", "tests", "tuning", "benchmarks", "profile"} <= skipped
    assert sum("compute-sanitizer" in name for name in skipped) == 3
    page = (tmp_path / "gpu-day.md").read_text()
    assert all(f"| {name} |" in page for name in steps) and day["commit"] in page
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"gpu-day.json", "gpu-day.md", "environment.log"}
