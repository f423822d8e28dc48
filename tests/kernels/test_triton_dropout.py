import pytest
import reference
import torch
from rules import strided, transposed

from tpkernels.kernels import dropout as kernel
from tpkernels.kernels.dropout import dropout


def seed_of(value, device):
    return torch.tensor([value], dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    "word, random",
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_reference_is_philox(word, random):
    """Random123's known answers for philox4x32 with 7 rounds."""
    out = reference.philox4x32([torch.tensor([word])] * 4, (word, word), 7)
    assert [int(x) for x in out] == list(random)


def check(x, p, row=0, column=0, seed=0x1234_5678_9ABC_DEF0):
    out = dropout(x, seed_of(seed, x.device), p, row, column)
    torch.testing.assert_close(
        out, reference.dropout(x, seed_of(seed, x.device), p, row, column), atol=0, rtol=0
    )
    assert out.is_contiguous()
    return out


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 37), (40, 64), (3, 1500)], ids=str)
@pytest.mark.parametrize("column", [0, 3, 6, 64])
def test_shapes(shape, column, device):
    check(torch.randn(shape, dtype=torch.bfloat16, device=device), 0.3, 11, column)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1 - 2**-34, 1.0])
def test_dtypes_and_probabilities(p, dtype, device):
    check(torch.randn(9, 66, dtype=dtype, device=device), p)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32])
@pytest.mark.parametrize(
    "row, column", [(0, 0), (2**31 - 2, 2**31), (2**32 - 3, 5), (2**40, 2**33 + 1)]
)
def test_seeds_and_places(seed, row, column, device):
    check(torch.ones(6, 10, device=device), 0.5, row, column, seed)


def test_parts_drop_what_the_whole_drops(device):
    x, seed = torch.randn(20, 50, device=device), seed_of(7, device)
    whole = dropout(x, seed, 0.4, 0, 0)
    for rows, cols in (
        (slice(0, 20), slice(13, 50)),
        (slice(5, 9), slice(0, 7)),
        (slice(19, 20), slice(49, 50)),
    ):
        part = dropout(x[rows, cols], seed, 0.4, rows.start, cols.start)
        torch.testing.assert_close(part, whole[rows, cols], atol=0, rtol=0)


def test_none_and_all(device):
    x = torch.randn(5, 9, device=device)
    torch.testing.assert_close(check(x, 0.0), x, atol=0, rtol=0)
    x[0, 0], x[0, 1] = torch.nan, torch.inf
    assert not check(x, 1.0).any()


def test_threshold_itself_is_kept(device):
    """Element (0, 5) has the second number of the counter (1, 0, 0, 0)."""
    random = int(
        reference.philox4x32([torch.tensor([word]) for word in (1, 0, 0, 0)], (9, 0), 7)[1]
    )
    x, seed = torch.ones(1, 8, device=device), seed_of(9, device)
    kept, dropped = (
        dropout(x, seed, threshold / 2**32, 0, 0)[0, 5].item() for threshold in (random, random + 1)
    )
    assert kept > 0 and dropped == 0


def test_seeds_differ_and_the_rate_is_p(device):
    x = torch.ones(64, 256, device=device)
    a, b = (check(x, 0.25, seed=seed) for seed in (1, 2))
    assert (
        0.2 < (a == 0).float().mean() < 0.3 and 0.3 < ((a == 0) != (b == 0)).float().mean() < 0.45
    )
    assert set(a.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


@pytest.mark.parametrize("lay", [strided, transposed])
def test_any_strides(lay, device):
    x = torch.randn(4, 3, 41, device=device)
    torch.testing.assert_close(check(lay(x), 0.5, 3, 2), check(x, 0.5, 3, 2), atol=0, rtol=0)


def test_the_seed_is_read_where_it_is(device):
    """A CUDA graph's replay has the same arguments and another seed in the tensor."""
    x, seed = torch.ones(8, 40, device=device), seed_of(1, device)
    first = dropout(x, seed, 0.5, 0, 0)
    seed += 1
    assert not torch.equal(first, dropout(x, seed, 0.5, 0, 0))
    seed -= 1
    torch.testing.assert_close(first, dropout(x, seed, 0.5, 0, 0), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape, device):
    assert dropout(torch.randn(shape, device=device), seed_of(0, device), 0.5, 0, 0).shape == shape


def test_tile_configurations_agree(monkeypatch, device):
    x, seed = torch.randn(9, 70, device=device), seed_of(3, device)
    want = dropout(x, seed, 0.5, 0, 0)
    for config in kernel.TUNABLE.candidates(64, 4):
        monkeypatch.setattr(
            kernel.TUNABLE, "candidates", lambda features, itemsize, config=config: [config]
        )
        torch.testing.assert_close(dropout(x, seed, 0.5, 0, 0), want, atol=0, rtol=0)
