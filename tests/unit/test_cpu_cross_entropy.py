"""The cross entropy of a shard of the vocabulary by the CPU kernels and in ATen calls."""

import pytest
import torch
from cpu_ops import COLUMNS, check, dtypes, make, vocab_ce_grad, vocab_ce_stats


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "half", "transposed"])
@pytest.mark.parametrize("columns", [*COLUMNS, 2500])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_vocab_ce(ops, columns, index, layout, dtype):
    rows, first = 9, 40
    logits = make(rows, columns, dtype=dtype, layout=layout)
    target = torch.randint(0, first + 2 * columns + 5, (rows,), dtype=index)
    target[:2] = torch.tensor([-100, first])
    stats = ops.vocab_ce_stats(logits, target, first)
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = vocab_ce_stats(logits.double(), target, first)
    torch.testing.assert_close(stats.double(), expected, rtol=2e-6, atol=1e-4)
    exact = [0, 2]
    assert torch.equal(stats[exact].double(), expected[exact])
    log_norm, scale = (stats[0] + stats[1].log(), torch.rand(rows, dtype=stats.dtype))
    scale[3], log_norm[3] = 0, torch.nan
    args = (logits, target, log_norm, scale, first, 0.1, 100)
    grad = ops.vocab_ce_grad(*args)
    assert not grad[3].any()
    check([grad], lambda *a: [vocab_ce_grad(*a).to(a[0].dtype)], args)
    ops.vocab_ce_grad_(*args)
    assert torch.equal(logits, grad)


def test_vocab_ce_of_minus_infinity(ops):
    logits = torch.randn(3, 70)
    logits[0], logits[1, 3:], logits[2, :40] = -torch.inf, -torch.inf, -torch.inf
    target = torch.tensor([0, 1, 69])
    stats = ops.vocab_ce_stats(logits, target, 0)
    torch.testing.assert_close(stats, vocab_ce_stats(logits, target, 0))
    assert stats[0, 0] == -torch.inf and stats[1, 0] == 0
    grad = ops.vocab_ce_grad(
        logits, target, stats[0] + stats[1].log(), torch.tensor([0.0, 1.0, 1.0]), 0, 0.0, 1
    )
    assert grad.isfinite().all() and not grad[0].any()
    torch.testing.assert_close(grad.sum(1), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_summed_accurately(dtype):
    """A running sum over all classes, as torch's log_softmax on CPUs has, is off by 1e-5."""
    logits = torch.randn(16, 49_152, generator=torch.Generator().manual_seed(0)).to(dtype)
    top, sums, _, total = torch.ops.tpkernels.vocab_ce_stats(
        logits, torch.zeros(16, dtype=torch.int64), 0
    )
    wide = logits.double()
    want = (wide - top.double()[:, None]).exp().sum(1)
    assert ((sums - want).abs() / want).max() < 5e-7
    assert ((total - wide.sum(1)).abs()).max() < 1e-3
