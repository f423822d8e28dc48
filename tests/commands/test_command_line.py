"""The commands but the demo itself, and the example, as a user runs them."""

import json
import os
import sys
from pathlib import Path

from processes import command, torchrun


def test_own_model_example():
    script = Path(__file__).parents[2] / "examples" / "own_model.py"
    run = torchrun(script)
    assert run.returncode == 0, run.stderr
    losses = [
        [float(word) for word in line.split()[3::2]]
        for line in run.stdout.splitlines()
        if line.startswith("step")
    ]
    assert len(losses) == 20 and all(
        abs(sharded - unsharded) <= 1e-4 * unsharded for sharded, unsharded in losses
    )
    assert losses[-1][0] < 0.8 * losses[0][0]


def test_tune_saves_what_it_measured(tmp_path):
    tune = sys.executable, "-m", "tpkernels", "tune", "--shape", "256,64,128"
    run = torchrun("--no-python", *tune, XDG_CACHE_HOME=str(tmp_path))
    assert run.returncode == 0, run.stderr
    (saved,) = (tmp_path / "tpkernels").glob("calibration-*.json")
    assert f"saved in {saved}" in " ".join(run.stdout.split())
    assert "float32" in json.loads(saved.read_text())["dtypes"]


def test_env_and_errors(tmp_path):
    facts = json.loads(command("env", "--json").stdout)
    assert facts["transports"][0] == "gloo" and facts["cores"] == os.cpu_count()
    for args, word in (
        (("--tp", "0"), "--tp"),
        (("--steps", "-1"), "--steps"),
        (("--json", str(tmp_path / "no" / "file.json")), "not a folder"),
    ):
        run = command("demo", *args)
        assert run.returncode != 0 and word in run.stderr, run.stderr
