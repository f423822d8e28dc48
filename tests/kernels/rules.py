"""Rules for good results, and inputs with unusual strides."""

import torch


def assert_as_good_as_torch(out, same_dtype, exact):
    """Require an error against float64 of at most twice that of torch in the same dtype."""
    assert out.dtype == same_dtype.dtype and out.shape == same_dtype.shape
    error, allowed = (
        (x.double() - exact).abs().max().item() if x.numel() else 0.0 for x in (out, same_dtype)
    )
    floor = 1e-12 if out.dtype == torch.float64 else 1e-6
    assert error < 2 * allowed + floor, f"error {error:.2e}, torch's {allowed:.2e}"


def strided(x):
    """Return the same values in rows that lie apart."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def transposed(x):
    """Return the same values without unit stride along the last dimension."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)
