"""The demo's figures are right, on a model of its kind that is small."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tpkernels.demo import model as demo_model
from tpkernels.demo import ranks, run

HIDDEN, HEAD_DIM, HEADS, KV_HEADS, WIDTH, VOCAB, BLOCKS = 24, 8, 3, 3, 42, 51, 2
ATTENTION, MLP, NORM = HEADS * HEAD_DIM * HIDDEN, WIDTH * HIDDEN, HIDDEN
STEPS = 3


def make_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=WIDTH,
        vocab_size=VOCAB,
        num_hidden_layers=BLOCKS,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def figures(pool, tmp_path_factory):
    """Return the demo's figures of 2 ranks, and what each rank returned."""
    folder = str(tmp_path_factory.mktemp("model"))
    model = make_model()
    model.save_pretrained(folder)
    batches = torch.randint(VOCAB, (2, demo_model.BATCH, 16))
    prompt = torch.randint(VOCAB, (1, 5))
    logits = model(batches[0]).logits.abs().max().item()
    reference = run._reference(model, batches, prompt, STEPS, folder, 2)
    each = pool.run(2, ranks.tpkernels_rank, folder, batches, prompt, STEPS, 1)
    dtensor = pool.run(3, ranks._dtensor_rank, folder, batches, STEPS, 1)[0]
    return run._figures(2, STEPS, reference, each, dtensor), each, logits


def test_against_the_unsharded_model(figures):
    result, _, logits = figures
    assert result["max_logit"] == pytest.approx(logits)
    assert 0 < result["max_logit_diff"] < 1e-4 * logits
    assert result["max_loss_rel_diff"] < 1e-6
    assert 0 < result["max_grad_rel_diff"] < 1e-4 and 0 < result["reference_grad_rel_error"] < 1e-4
    assert result["losses"] == pytest.approx(result["reference_losses"], rel=1e-5)
    assert len(set(result["losses"])) == STEPS
    assert result["generated"] == result["reference_generated"]
    assert len(result["generated"]) == demo_model.NEW_TOKENS
    assert result["seconds_per_step"] > 0 and result["reference_seconds_per_step"] > 0
    assert result["dtensor_losses"] == pytest.approx(result["reference_losses"], rel=1e-5)
    assert result["dtensor_note"] is None and result["dtensor_seconds_per_step"] > 0
    assert result["tokens_per_step"] == 128


def test_shards(figures):
    result, each, _ = figures
    assert [rank["heads"] for rank in each] == [(2, 2), (1, 1)]
    block = 4 * ATTENTION + 3 * MLP + 2 * NORM
    assert result["param_bytes_unsharded"] == 4 * (BLOCKS * block + VOCAB * HIDDEN + NORM)
    assert result["param_bytes"] == [
        4 * (BLOCKS * (4 * ATTENTION * heads // HEADS + 3 * MLP // 2 + 2 * NORM) + rows + NORM)
        for heads, rows in ((2, 26 * HIDDEN), (1, 25 * HIDDEN))
    ]
    split = {row.pop("parameter"): row for row in result["split"]}
    assert split["layers.*.self_attn.q_proj"] == dict(
        shape=(24, 24), split="rows", sizes=[16, 8], bytes=4 * 16 * 24
    )
    assert split["layers.*.self_attn.o_proj"]["split"] == "columns"
    assert split["embed_tokens"]["sizes"] == [26, 25]
    assert split["norm"] == dict(shape=(24,), split="whole", sizes=None, bytes=4 * 24)
    assert not any(".1." in name for name in split)


def test_communication(figures):
    result, *_ = figures
    assert result["all_reduces_per_block_forward"] == result["all_reduces_per_block_backward"] == 2
    block = dict(count=2 * BLOCKS, bytes=2 * BLOCKS * 4 * demo_model.BATCH * 16 * HIDDEN)
    assert result["collectives"]["row_forward"] == result["collectives"]["column_backward"] == block


def test_dtensor_is_tried_where_the_ranks_divide_the_heads():
    for tp, heads, reason in (
        (1, (9, 3), "one rank"),
        (2, (9, 3), "9 heads and 3 KV heads over 2"),
    ):
        assert reason in ranks.dtensor_seconds(tp, heads, "", torch.empty(0), 3, 1)


def test_more_ranks_than_heads_are_refused(monkeypatch):
    monkeypatch.setattr(run, "find_weights", lambda: "")
    monkeypatch.setattr(run, "load_model", lambda weights: (make_model(), None, None, None))
    message = "tp=4: the model has 3 attention heads, and each rank needs at least one; use 1 to 3"
    with pytest.raises(ValueError, match=message):
        run.run_demo(4, 1, None)
