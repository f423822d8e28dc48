"""Triton kernels of the fused ops. They are what the ops run on GPUs; csrc/fused and csrc/cpu are what they run elsewhere."""

from __future__ import annotations

import importlib
import importlib.util

import torch

FAMILIES = ("activation", "linear", "norm", "cross_entropy", "dropout", "rotary")
_libraries: list[torch.library.Library] = []  # a Library's registrations end with it


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def register(dispatch_key: str = "CUDA") -> None:
    """Makes the Triton kernels the ops' implementation for a dispatch key; tests register them for CPU, in Triton's interpreter."""
    library = torch.library.Library("tpkernels", "IMPL")
    for family in FAMILIES:
        for name, launch in importlib.import_module(f"{__name__}.{family}").OPS.items():
            library.impl(name, launch, dispatch_key, allow_override=True)
    _libraries.append(library)
