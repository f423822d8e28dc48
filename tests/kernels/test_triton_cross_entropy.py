import pytest
import reference
import torch
from rules import assert_as_good_as_torch, strided, transposed

from tpkernels.kernels import cross_entropy
from tpkernels.kernels.launch_config import Config

SHAPES = [(1, 1), (5, 7), (9, 100), (3, 1000), (9, 64)]


@pytest.fixture(params=[None, 16], ids=["whole", "blocks"])
def blocks(request, monkeypatch):
    if request.param:
        config = Config(dict(BLOCK_M=4, BLOCK_N=request.param))
        for tunable in (cross_entropy.STATS, cross_entropy.GRAD):
            monkeypatch.setattr(tunable, "candidates", lambda features, itemsize: [config])


def make(shape, dtype, device, vocab_start_index=10, target_dtype=torch.int64):
    """Targets before, in and after this rank's columns."""
    logits = 3 * torch.randn(shape, dtype=dtype, device=device)
    return (
        logits,
        torch.randint(
            0, vocab_start_index + 2 * shape[1], shape[:1], dtype=target_dtype, device=device
        ),
        vocab_start_index,
    )


def check_stats(logits, target, vocab_start_index):
    out, same = (
        cross_entropy.vocab_ce_stats(logits, target, vocab_start_index),
        reference.vocab_ce_stats(logits, target, vocab_start_index),
    )
    exact = reference.vocab_ce_stats(logits.double(), target, vocab_start_index)
    for row in (0, 2):  # single logits
        torch.testing.assert_close(out[row], same[row], atol=0, rtol=0)
    for row in (1, 3):
        assert_as_good_as_torch(
            out[row] / exact.shape[1], same[row] / exact.shape[1], exact[row] / exact.shape[1]
        )


def check_grad(logits, target, vocab_start_index, smoothing=0.1, num_classes=64):
    opmath = torch.promote_types(logits.dtype, torch.float32)
    log_norm = logits.to(opmath).logsumexp(-1) + 0.5
    scale = torch.randn(logits.shape[0], dtype=opmath, device=logits.device)
    scale[::3], log_norm[:1] = 0, torch.inf
    out = cross_entropy.vocab_ce_grad(
        logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes
    )
    exact = reference.vocab_ce_grad(
        logits.double(),
        target,
        log_norm.double(),
        scale.double(),
        vocab_start_index,
        smoothing,
        num_classes,
    )
    assert_as_good_as_torch(
        out,
        reference.vocab_ce_grad(
            logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes
        ),
        exact,
    )
    assert not out[::3].any() and out.is_contiguous()
    in_place = logits.clone()
    assert (
        cross_entropy.vocab_ce_grad_(
            in_place, target, log_norm, scale, vocab_start_index, smoothing, num_classes
        )
        is None
    )
    torch.testing.assert_close(in_place, out, atol=0, rtol=0)


@pytest.mark.parametrize("check", [check_stats, check_grad])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(check, shape, blocks, device):
    check(*make(shape, torch.bfloat16, device))


@pytest.mark.parametrize("check", [check_stats, check_grad])
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32])
def test_dtypes(check, dtype, target_dtype, device):
    check(*make((6, 70), dtype, device, target_dtype=target_dtype))


@pytest.mark.parametrize("lay", [strided, transposed])
def test_any_strides(lay, device):
    logits, target, vocab_start_index = make((6, 40), torch.float32, device)
    both = torch.stack([target, target], 1)[:, 0]
    ones = torch.stack([torch.ones(6, device=device)] * 2, 1)[:, 0]
    a, b = (
        cross_entropy.vocab_ce_stats(lay(logits), both, vocab_start_index),
        cross_entropy.vocab_ce_stats(logits, target, vocab_start_index),
    )
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    want = cross_entropy.vocab_ce_grad(logits, target, ones, ones, vocab_start_index, 0.0, 1)
    torch.testing.assert_close(
        cross_entropy.vocab_ce_grad(lay(logits), both, ones, ones, vocab_start_index, 0.0, 1),
        want,
        atol=0,
        rtol=0,
    )
    in_place = lay(logits.clone())
    cross_entropy.vocab_ce_grad_(in_place, target, ones, ones, vocab_start_index, 0.0, 1)
    torch.testing.assert_close(in_place, want, atol=0, rtol=0)


def test_integer_logits_are_exact(blocks, device):
    """All logits equal: exp is of 0."""
    logits = torch.full((5, 100), 2.0, device=device)
    out = cross_entropy.vocab_ce_stats(logits, torch.tensor([3, 102, 103, 2, 50], device=device), 3)
    want = torch.tensor(
        [[2.0] * 5, [100.0] * 5, [2.0, 2.0, 0.0, 0.0, 2.0], [200.0] * 5], device=device
    )
    torch.testing.assert_close(out, want, atol=0, rtol=0)


def test_minus_infinity(blocks, device):
    """Masked logits: some, the first block's, all but the last, and a whole row."""
    logits = torch.randn(5, 70, device=device)
    logits[1, ::3] = logits[2, :40] = logits[3, :-1] = logits[4] = -torch.inf
    target = torch.tensor([4, 1, 2, 69, 0], device=device)
    out, exact = (
        cross_entropy.vocab_ce_stats(logits, target, 0),
        reference.vocab_ce_stats(logits.double(), target, 0),
    )
    assert out[0, 4] == out[2, 4] == -torch.inf and out[1, 4] == 0
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    zeros, ones = torch.zeros(5, device=device), torch.ones(5, device=device)
    elsewhere = torch.full_like(target, 70)  # another rank's
    grad = cross_entropy.vocab_ce_grad(logits, elsewhere, zeros, ones, 0, 0.0, 1)
    torch.testing.assert_close(grad, logits.exp(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(value, blocks, device):
    logits = torch.randn(4, 70, device=device)
    logits[1, 33] = value
    target = torch.zeros(4, dtype=torch.int64, device=device)
    out, same = (
        cross_entropy.vocab_ce_stats(logits, target, 0),
        reference.vocab_ce_stats(logits, target, 0),
    )
    torch.testing.assert_close(out, same, atol=1e-4, rtol=1e-5, equal_nan=True)
    assert out[1].isnan().tolist() == [False, True, False, False]


def test_rows_that_do_not_count(device):
    """A scale of 0 gives 0 whatever the logits and the norm."""
    logits, bad = (
        torch.full((3, 20), torch.nan, device=device),
        torch.tensor([torch.nan, torch.inf, -torch.inf], device=device),
    )
    target = torch.zeros(3, dtype=torch.int64, device=device)
    assert (
        cross_entropy.vocab_ce_grad(logits, target, bad, torch.zeros(3, device=device), 0, 0.0, 1)
        == 0
    ).all()
    assert (
        cross_entropy.vocab_ce_grad(logits, target, bad, torch.ones(3, device=device), 0, 0.0, 1)
        .isnan()
        .all()
    )


def test_empty(device):
    none, three = (torch.zeros(n, dtype=torch.int64, device=device) for n in (0, 3))
    logits = torch.randn(3, 0, dtype=torch.bfloat16, device=device)
    want = torch.tensor([-torch.inf, 0, 0, 0], device=device)[:, None].expand(4, 3)
    torch.testing.assert_close(cross_entropy.vocab_ce_stats(logits, three, 0), want, atol=0, rtol=0)
    assert cross_entropy.vocab_ce_stats(logits.new_empty(0, 9), none, 0).shape == (4, 0)
    for rows, target in ((logits, three), (logits.new_empty(0, 9), none)):
        ones = torch.ones(rows.shape[0], device=device)
        assert cross_entropy.vocab_ce_grad(rows, target, ones, ones, 0, 0.0, 1).shape == rows.shape
        cross_entropy.vocab_ce_grad_(rows, target, ones, ones, 0, 0.0, 1)
