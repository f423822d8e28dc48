"""The configurations of the project's Triton kernels, which the gates compile and measure and
docs/kernels.md lists.

They are recorded from what the launchers of tpkernels/kernels pass to Triton (aot_specs.py), so
they cannot differ from it.
"""

from __future__ import annotations

import functools
import importlib.util

from aot import Spec
from workers import pool

# Kernels whose output is small beside their input, or that are small themselves.
KINDS = {"stats_kernel": "reduction", "sum_partials_kernel": "other"}


@functools.cache
def load() -> list[Spec]:
    """Recorded in a worker, so that this process imports no Triton."""
    if importlib.util.find_spec("aot_specs") is None:
        return []
    with pool(1) as workers:
        return workers.submit(_record).result(timeout=300)


def _record() -> list[Spec]:
    import aot_specs
    import triton.language as tl

    return [
        Spec(
            name=found["name"],
            kernel=f"{found['kernel'].fn.__module__}:{found['kernel'].__name__}",
            signature=found["signature"],
            # A Triton type by its name: to hand over the object would import Triton into the
            # process that asked.
            constexprs={
                name: value.name if isinstance(value, tl.dtype) else value
                for name, value in found["constexprs"].items()
            },
            num_warps=found["num_warps"],
            num_stages=found["num_stages"],
            kind=KINDS.get(found["kernel"].__name__, found["kind"]),
            divisible=tuple(found["divisible"]),
            op=found["name"].rpartition(": ")[0],
            case="specs:run",
            scratch=found["scratch"],
        )
        for found in aot_specs.specs()
    ]


@functools.cache
def _launches() -> dict:
    import aot_specs

    return {found["name"].rpartition(": ")[0]: found["launch"] for found in aot_specs.specs()}


def run(op: str) -> dict:
    """The case that traffic.measure runs."""
    return _launches()[op]()
