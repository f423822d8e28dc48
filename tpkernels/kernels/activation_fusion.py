"""The rule that decides whether an activation is fused into its GEMM's epilogue."""

from __future__ import annotations

import torch

# Dense bf16 FLOP/s and memory bytes/s by compute capability, SXM parts (NVIDIA's data sheets of
# A100, H100 and B200).
PEAKS = {8: (312e12, 2.0e12), 9: (989e12, 3.35e12), 10: (2250e12, 8.0e12)}
# Speed of Triton's GEMMs relative to cuBLAS's: tutorials and Liger report 0.8 to 1.0. Published,
# not measured here.
TRITON_OF_CUBLAS = 0.85


def fuses_activation(
    device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, keep: bool
) -> bool:
    """Return whether the activation in a Triton GEMM's epilogue is expected to beat cuBLAS.

    cuBLAS needs a pass of its own for the activation. That pass reads the pre-activation, and
    cuBLAS writes it even where no gradient needs it (`keep` False). The Triton GEMM takes longer
    wherever arithmetic bounds the GEMM. CPUs and float32 never fuse.

    Args:
        device: where the layer runs.
        dtype: of the GEMM.
        M: rows of the input.
        N: rows of this rank's weight.
        K: columns of the weight.
        keep: the gradient needs the pre-activation.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    flops, bandwidth = PEAKS.get(torch.cuda.get_device_capability(device)[0], PEAKS[9])
    reads = 2 * N * K / bandwidth
    gemm = max(2 * M * N * K / flops, reads)
    triton_gemm = max(2 * M * N * K / (flops * TRITON_OF_CUBLAS), reads)
    return triton_gemm - gemm < M * N * 2 * (1 if keep else 2) / bandwidth
