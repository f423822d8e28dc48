import pytest
import reference
import torch
from rules import assert_as_good_as_torch

from tpkernels.kernels.rotary import rotary

KINDS = pytest.mark.parametrize(
    "interleaved, inverse", [(False, False), (False, True), (True, False), (True, True)]
)


def make(shape, rotated, dtype, device, per_sequence=False, angle_dtype=None):
    batches, _, tokens, _ = shape
    angles = torch.randn(
        *([batches] if per_sequence else []),
        tokens,
        rotated // 2,
        dtype=torch.float64,
        device=device,
    )
    return torch.randn(shape, dtype=dtype, device=device), *(
        t.to(angle_dtype or dtype) for t in (angles.cos(), angles.sin())
    )


def check(x, cos, sin, interleaved, inverse):
    out = rotary(x, cos, sin, interleaved, inverse)
    exact = reference.rotary(x.double(), cos.double(), sin.double(), interleaved, inverse)
    assert_as_good_as_torch(
        out, reference.rotary(x, cos.to(x.dtype), sin.to(x.dtype), interleaved, inverse), exact
    )
    rotated = 2 * cos.shape[-1]
    torch.testing.assert_close(out[..., rotated:], x[..., rotated:], atol=0, rtol=0)
    assert out.stride() == torch.empty_like(x).stride()
    return out


@KINDS
@pytest.mark.parametrize(
    "shape, rotated",
    [((1, 1, 1, 2), 2), ((2, 3, 5, 16), 16), ((2, 5, 7, 20), 12), ((1, 9, 33, 80), 80)],
    ids=str,
)
@pytest.mark.parametrize("per_sequence", [False, True], ids=["shared", "per sequence"])
def test_shapes(shape, rotated, per_sequence, interleaved, inverse, device):
    check(*make(shape, rotated, torch.bfloat16, device, per_sequence), interleaved, inverse)


@KINDS
def test_dtypes(dtype, interleaved, inverse, device):
    check(*make((2, 3, 9, 24), 16, dtype, device), interleaved, inverse)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_of_another_dtype(interleaved, device):
    check(
        *make((2, 3, 9, 24), 24, torch.bfloat16, device, angle_dtype=torch.float32),
        interleaved,
        False,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        lambda x: torch.cat([x, x, x], 1)[:, 3:6],
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=[
        "tokens first",
        "features first",
        "part of a packed tensor",
        "every other feature",
        "expanded",
    ],
)
def test_any_strides(lay, interleaved, device):
    x, cos, sin = make((2, 3, 9, 24), 16, torch.float32, device)
    laid = lay(x)
    want = rotary(laid.contiguous(), cos, sin, interleaved, False)
    torch.testing.assert_close(check(laid, cos, sin, interleaved, False), want, atol=0, rtol=0)
    apart = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (cos, sin)]
    torch.testing.assert_close(rotary(laid, *apart, interleaved, False), want, atol=0, rtol=0)
    torch.testing.assert_close(
        rotary(laid, cos.t().contiguous().t(), sin, interleaved, False), want, atol=0, rtol=0
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_quarter_turns_are_exact(interleaved, device):
    x = torch.arange(2 * 3 * 4 * 8, dtype=torch.float32, device=device).view(2, 3, 4, 8)
    cos, sin = torch.zeros(4, 4, device=device), torch.ones(4, 4, device=device)
    turned = rotary(x, cos, sin, interleaved, False)
    torch.testing.assert_close(
        turned, reference.rotary(x, cos, sin, interleaved, False), atol=0, rtol=0
    )
    torch.testing.assert_close(rotary(turned, cos, sin, interleaved, True), x, atol=0, rtol=0)
    torch.testing.assert_close(rotary(turned, cos, sin, interleaved, False), -x, atol=0, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_nan_stays_in_its_pair(interleaved, device):
    x, cos, sin = make((1, 2, 3, 8), 8, torch.float32, device)
    x[0, 1, 2, 0] = torch.nan
    places = rotary(x, cos, sin, interleaved, False).isnan().nonzero().tolist()
    assert places == [[0, 1, 2, 0], [0, 1, 2, 1 if interleaved else 4]]


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_empty(shape, device):
    assert rotary(*make(shape, 8, torch.bfloat16, device), False, False).shape == shape


def test_nothing_rotated(device):
    x, cos, sin = make((2, 2, 3, 8), 0, torch.bfloat16, device)
    torch.testing.assert_close(rotary(x, cos, sin, False, False), x, atol=0, rtol=0)
