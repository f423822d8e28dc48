"""Sums of a large vocabulary by the CPU kernel of the cross entropy."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_summed_accurately(dtype):
    """Where a running sum over all classes, as torch's log_softmax on CPUs has, is off by 1e-5."""
    logits = torch.randn(16, 49_152, generator=torch.Generator().manual_seed(0)).to(dtype)
    top, sums, _, total = torch.ops.tpkernels.vocab_ce_stats(
        logits, torch.zeros(16, dtype=torch.int64), 0
    )
    wide = logits.double()
    want = (wide - top.double()[:, None]).exp().sum(1)
    assert ((sums - want).abs() / want).max() < 5e-7
    assert ((total - wide.sum(1)).abs()).max() < 1e-3
