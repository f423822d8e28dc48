"""The constants of the time model, fitted to measured steps."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from .errors import unknown_name
from .hardware import Hardware
from .model import DATA


@dataclass(frozen=True)
class Constants:
    """Constants of one GPU, fitted to measured steps (data/fitted.json) or stated in its file.

    Attributes:
        gemm: share of the peak that a GEMM of many full tiles reaches.
        attention: the same for attention's core.
        tail: waves of tiles that a GEMM loses at its end.
        memory: share of the memory bandwidth that element-wise kernels reach.
        host: minimum seconds of a block's forward pass, which Python and the launches take. The
            backward pass takes half as much again.
        skew: growth of `host` on 8 TP ranks, which wait for the slowest, as a share of it. On n
            ranks it is ((n - 1) / 7)^2 of that.
        link, network: shares of the bus bandwidths that collectives reach in and between nodes.
        reduce, send: seconds of an all-reduce, of a pipeline's send, without their bytes.
        update: bytes that the optimizer moves for a parameter.
        step: seconds of a step that nothing else counts.
        hidden: largest share of a collective that overlaps with compute.
    """

    gemm: float
    attention: float
    tail: float
    memory: float
    host: float
    skew: float
    link: float
    network: float
    reduce: float
    send: float
    update: float
    step: float
    hidden: float


@functools.cache
def constants_of(hardware: Hardware) -> Constants:
    """Return a GPU's constants: the fitted ones that its file names, and the file's own.

    Raises:
        PlanError: no constants are fitted to the GPU that its file names.
    """
    fitted = json.loads((DATA / "fitted.json").read_text())["constants"]
    if hardware.constants_of not in fitted:
        raise unknown_name("GPU with fitted constants", hardware.constants_of, fitted)
    return Constants(**{**fitted[hardware.constants_of], **dict(hardware.constants)})
