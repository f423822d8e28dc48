"""Registration of the Triton kernels as the ops' implementation on GPUs.

Importing this file does not import Triton.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

OP_MODULES = ("activation", "column_linear", "norm", "cross_entropy", "dropout", "rotary")
_libraries: list[torch.library.Library] = []  # a Library's registrations end with it


def available() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def register(dispatch_key: str = "CUDA") -> None:
    """Make the Triton kernels the ops' implementation for a dispatch key.

    Args:
        dispatch_key: "CUDA", or "CPU" in tests, where Triton's interpreter runs the kernels.

    Example:
        >>> if available():
        ...     register("CUDA")
    """
    library = torch.library.Library("tpkernels", "IMPL")
    for module in OP_MODULES:
        for name, launch in importlib.import_module(f"{__package__}.{module}").OPS.items():
            library.impl(name, launch, dispatch_key, allow_override=True)
    _libraries.append(library)
