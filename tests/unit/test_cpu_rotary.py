"""The rotary embedding by the CPU kernels and in ATen calls."""

import pytest
import torch
from cpu_ops import check, dtypes, make, rotary


@dtypes
@pytest.mark.parametrize(
    "features,rotated", [(16, 16), (34, 34), (80, 20), (6, 2), (8, 0), (128, 128)]
)
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed", "dbth"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(ops, interleaved, layout, features, rotated, dtype):
    batch, heads, steps = 2, 3, 5
    if layout == "bhtd":
        x = make(batch, heads, steps, features, dtype=dtype)
    elif layout == "bthd":
        x = make(batch, steps, heads, features, dtype=dtype).transpose(1, 2)
    elif layout == "packed":  # q of [q, k, v]
        x = make(batch, steps, 3 * heads, features, dtype=dtype)[:, :, :heads].transpose(1, 2)
    else:
        x = make(features, batch, steps, heads, dtype=dtype).permute(1, 3, 2, 0)
    for shape in ((steps, rotated // 2), (batch, steps, rotated // 2)):
        angle = torch.randn(shape, dtype=torch.float64)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for inverse in (False, True):
            out = ops.rotary(x, cos, sin, interleaved, inverse)
            assert out.stride() == torch.empty_like(x).stride()
            check([out], lambda *a: [rotary(*a)], (x, cos, sin, interleaved, inverse))
    wider = ops.rotary(x, cos.double(), sin.double(), interleaved, True)
    assert wider.dtype == dtype and torch.equal(wider, out)


def test_rotary_of_nothing(ops):
    x = torch.empty(2, 0, 5, 8)
    assert ops.rotary(x, torch.ones(5, 4), torch.ones(5, 4), False, False).shape == x.shape
