"""The `tpkernels plan` command, and the page that shows its output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import doc_blocks
import pytest
from planner_cases import run_plan

from tpkernels_planner.model_config import gpt_model

ROOT = Path(__file__).parents[2]
PREDICT = [
    "predict",
    "--gpu",
    "a100-80",
    "--hidden",
    "12288",
    "--layers",
    "96",
    "--heads",
    "96",
    "--seq",
    "2048",
    "--vocab",
    "51200",
    "--tp",
    "8",
    "--pp",
    "8",
    "--dp",
    "8",
    "--global-batch",
    "512",
    "--micro-batch",
    "1",
    "--interleave",
    "1",
]


def test_predict_as_other_scripts_call_it():
    run = run_plan(*PREDICT, *["--recompute", "full", "--zero", "0", "--json", "-"])
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    model = gpt_model(12288, 96, 96, 51200)
    assert result["memory_bytes"] == sum(result["memory_parts_bytes"].values())
    assert result["tflops_per_gpu"] == pytest.approx(
        512 * model.step_flops(2048) / result["step_s"] / 512 / 1e12
    )
    assert result["mfu"] == pytest.approx(result["tflops_per_gpu"] / 312)
    assert 1.25 < result["hardware_tflops_per_gpu"] / result["tflops_per_gpu"] < 1.34
    assert 90 < result["tflops_per_gpu"] < 140
    assert result["software"] == "megatron-2021"
    options = ["--recompute", "none", "--sequence-parallel", "--zero", "1", "--json", "-"]
    run = run_plan("predict", "--gpu", "h100", *PREDICT[3:], *options)
    other = json.loads(run.stdout)
    assert (
        other["software"] == "tpkernels"
        and other["layout"]["sequence_parallel"]
        and other["layout"]["zero"] == 1
    )


def test_commands(tmp_path):
    model = ["--model", "llama-70b", "--gpus", "512", "--gpu", "h100", "--batch-tokens", "4M"]
    run = run_plan(*model, "--json", str(tmp_path / "plan.json"), "--top", "3")
    assert run.returncode == 0 and "Step time by TP size" in run.stdout and "DP 64" in run.stdout, (
        run.stderr
    )
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert len(saved["rows"]) == 3 and saved["advice"] and os.listdir(tmp_path) == ["plan.json"]
    run = run_plan("compare", "tp=8,zero=1,sp", "tp=4,zero=3", *model)
    assert run.returncode == 0 and "TP 8, DP 64, SP, ZeRO-1" in run.stdout, run.stdout + run.stderr
    run = run_plan("explain", "tp=8,zero=1,sp", *model)
    assert run.returncode == 0 and "arXiv 2104.04473" in run.stdout, run.stderr
    run = run_plan("--sweep", "gpus", *model)
    assert run.returncode == 0 and "512 GPUs, tokens/s a GPU" in run.stdout, run.stderr
    run = run_plan("explain", "--row", "2", *model)
    assert run.returncode == 0 and "MFU =" in run.stdout, run.stderr
    (tmp_path / "empty.md").write_text("no sections")
    for refused, words in (
        (
            ["--sweep", "gpus", "--model", "llama-7b", "--gpus", "0", "--global-batch", "8"],
            "gpus must be",
        ),
        (["validate", "--page", str(tmp_path / "empty.md")], "has no section <!-- errors -->"),
        (["validate", "--page", str(tmp_path / "none.md")], "No such file"),
    ):
        run = run_plan(*refused)
        assert run.returncode == 1 and words in run.stderr and "Traceback" not in run.stderr, (
            run.stderr
        )
    run = run_plan("--model", "lama", "--gpus", "8", "--global-batch", "8")
    assert run.returncode == 1 and "near it" in run.stderr and "Traceback" not in run.stderr


NO_TORCH = """
import sys
sys.argv = ["tpkernels", "plan", "layouts", "--help"]
from tpkernels_command import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def test_planning_needs_no_torch():
    run = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True)
    assert run.returncode == 0 and "--batch-tokens" in run.stdout, run.stderr
    assert "Usage: tpkernels plan layouts" in run.stdout


def test_python_m_tpkernels_plans_too():
    command = [sys.executable, "-m", "tpkernels", "plan", "layouts", "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "--batch-tokens" in run.stdout, run.stderr


def test_fit_needs_a_checkout(tmp_path):
    shutil.copytree(ROOT / "tpkernels_planner", tmp_path / "tpkernels_planner")
    code = "from tpkernels_planner.cli import app; app(['fit'])"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH="")
    )
    assert run.returncode == 1 and "fit needs a checkout" in run.stderr, run.stderr
    assert run.stderr.count("\n") == 1


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    model = ["--model", "llama-7b", "--gpus", "16", "--global-batch", "64"]
    for name, extra in (("rows.svg", []), ("sweep.png", ["--sweep", "gpus"])):
        run = run_plan(*model, *extra, "--picture", str(tmp_path / name))
        assert run.returncode == 0 and (tmp_path / name).stat().st_size > 5000, run.stderr
    run = run_plan(*model, "--picture", str(tmp_path / "rows.docx"))
    assert run.returncode == 1 and "end it in .svg" in run.stderr
    assert sorted(os.listdir(tmp_path)) == ["rows.svg", "sweep.png"]


def test_the_pages_commands_print_what_they_show():
    page = (ROOT / "docs" / "when-to-use-tp.md").read_text()
    assert len(doc_blocks.BLOCK.findall(page)) >= 5
    assert doc_blocks.refreshed(page) == page, (
        "run `python tests/doc_blocks.py docs/when-to-use-tp.md`"
    )
