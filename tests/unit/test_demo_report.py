"""The demo prints each figure where it belongs, in its unit."""

import io
import re

import pytest
from rich.console import Console

from tpkernels.demo import report

RESULT = dict(
    tp=2,
    split=[
        dict(parameter="q_proj.weight", shape=[6, 4], split="rows", sizes=[4, 2]),
        dict(parameter="norm.weight", shape=[4], split="", sizes=None),
    ],
    param_bytes_unsharded=8 << 20,
    param_bytes=[5 << 20, 4 << 20],
    max_logit_diff=1.2e-5,
    max_logit=31.26,
    max_loss_rel_diff=2.5e-7,
    max_grad_rel_diff=3.5e-6,
    generated=[5, 6, 7],
    reference_generated=[5, 6, 7],
    reference_grad_rel_error=4.5e-6,
    generated_text=" there was",
    losses=[3.0, 2.5],
    reference_losses=[3.0, 2.0],
    all_reduces_per_block_forward=2.0,
    all_reduces_per_block_backward=2.5,
    collectives={"mlp": dict(count=4, bytes=1_250_000), "loss": dict(count=1, bytes=8_000)},
    tokens_per_step=96,
    seconds_per_step=0.251,
    machine=dict(cores=2),
    reference_seconds_per_step=0.374,
    dtensor_seconds_per_step=None,
    dtensor_note="cannot shard 3 heads",
)
TWO_RANKS = """\
How each module was sharded
parameter shape sharded by sizes on the ranks
q_proj.weight 6 x 4 rows 4 + 2
norm.weight 4
heads on the ranks: 2 + 1 query, 1 + 1 KV
parameters: 5.0 MiB (62.5%), 4.0 MiB (50.0%) of 8.0 MiB
Against the unsharded model
measured
largest logit difference 1.2e-05 (logits up to 31.3)
loss, relative difference 2.5e-07
gradients, largest relative difference 3.5e-06
3 generated tokens the same
Gradients: against the unsharded model with its loss in float64; its own float32 log_softmax puts it
4.5e-06 off.
Once there was
Fine-tuning on the opening of Alice in Wonderland:
loss
step sharded unsharded relative difference
0 3.000000 3.000000 0.0e+00
1 2.500000 2.000000 2.5e-01
Communication: 2 all-reduces a
block forward, 2.5 backward
collective in a step MB
mlp 4 1.25
loss 1 0.01
Time of a training step, median
96 tokens a step seconds
tpkernels, 2 ranks 0.25
unsharded model, one process on 2 cores 0.37
torch DTensor, 2 ranks cannot shard 3 heads
"""


@pytest.fixture
def printed(monkeypatch):
    """Return the lines of a report, their words alone."""
    text = io.StringIO()
    monkeypatch.setattr(report, "console", Console(file=text, width=100, color_system=None))
    monkeypatch.setattr(report, "PROMPT", "Once")

    def lines(result, heads):
        report.print_report(result, heads)
        rows = re.sub("[\u2500-\u257f]", " ", text.getvalue()).splitlines()  # box drawing
        return [" ".join(row.split()) for row in rows if row.strip()]

    return lines


def test_of_two_ranks(printed):
    assert printed(RESULT, [(2, 1), (1, 1)]) == TWO_RANKS.splitlines()


def test_of_one_rank_that_differs(printed):
    changed = dict(tp=1, generated=[5, 6, 8], dtensor_seconds_per_step=0.5, param_bytes=[8 << 20])
    lines = printed(RESULT | changed, [(3, 2)])
    assert {
        "heads on the ranks: 3 query, 2 KV",
        "parameters: 8.0 MiB (100.0%) of 8.0 MiB",
        "3 generated tokens DIFFERENT",
        "tpkernels, 1 rank 0.25",
        "torch DTensor, 1 rank 0.50",
    } <= set(lines)
    assert not any(line.startswith("Gradients:") for line in lines)
