"""The GEMMs that CPUs may take instead of at::mm, and how a test forces one."""

import contextlib

import pytest
import torch

from tpkernels import _C

OPS = torch.ops.tpkernels


Library = _C.Library


# (library, wide, packed)
GEMMS = [
    (library, widened, packed)
    for library in (Library.aten, Library.mkl, Library.onednn)
    for widened in (False, True)
    for packed in (False, True)
    if _C.has_library(library)
    and packed >= (library == Library.mkl)
    and not (packed and library == Library.aten)
]


IDS = [f"{g[0].name}{'-wide' * g[1]}{'-packed' * g[2]}" for g in GEMMS]


PACKED = next((g for g in GEMMS if g == (Library.onednn, False, True)), None) or next(
    (g for g in GEMMS if g[2]), None
)


needs_packing = pytest.mark.skipif(
    PACKED is None, reason="this torch has neither MKL nor oneDNN: nothing is packed"
)


@contextlib.contextmanager
def forced(gemm):
    _C.force_gemm(gemm)
    try:
        yield
    finally:
        _C.force_gemm(None)


def can(gemm, dtype):
    """Return True unless oneDNN takes this half type as it is on other machines only."""
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    narrow_onednn = gemm[0] == Library.onednn and not gemm[1] and dtype in supported
    return not narrow_onednn or getattr(torch.ops.mkldnn, supported[dtype])()


def integers(*shape, dtype=torch.float32):
    """Every sum below is exact, in bfloat16 too."""
    return torch.randint(-1, 2, shape).to(dtype)
