"""The sizes where the schedule fuses the activation into the column-parallel GEMM."""

from unittest import mock

import torch

from tpkernels.kernels.activation_fusion import fuses_activation


def fuses(capability, rows, features, in_features, keep, dtype=torch.bfloat16, device="cuda"):
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability):
        return fuses_activation(torch.device(device), dtype, rows, features, in_features, keep)


def test_where_the_schedule_takes_it():
    assert not fuses((9, 0), 16, 4096, 512, False, device="cpu")
    assert not fuses((9, 0), 16, 4096, 512, False, dtype=torch.float32)
    # With so few rows the weights' bytes decide, and Triton's GEMM is no slower.
    assert fuses((9, 0), 4, 4096, 8192, True)
    # Long sums go to cuBLAS.
    assert fuses((9, 0), 8192, 8192, 512, True) and not fuses((9, 0), 8192, 8192, 8192, True)
    between = [
        k
        for k in range(256, 8192, 256)
        if fuses((9, 0), 8192, 8192, k, False) and not fuses((9, 0), 8192, 8192, k, True)
    ]
    assert between  # a pre-activation that need not be stored is worth more
    assert fuses((12, 0), 8192, 8192, 512, True)  # a chip that is not in the table


def most_in_features(capability):
    """Return the longest sums, in steps of 64, that an op with a gradient still fuses."""
    return max(k for k in range(64, 8192, 64) if fuses(capability, 8192, 8192, k, True))


def test_each_chip_has_its_own_peaks():
    """Arithmetic bounds the GEMM: 2 K (1 / 0.85 - 1) / flops < 2 / bandwidth."""
    for capability, flops, bandwidth in (
        ((8, 0), 312e12, 2.0e12),
        ((9, 0), 989e12, 3.35e12),
        ((10, 0), 2250e12, 8.0e12),
    ):
        limit = flops / bandwidth / (1 / 0.85 - 1)
        assert most_in_features(capability) == limit // 64 * 64
