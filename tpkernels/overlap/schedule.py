"""The schedule of a layer: in how many row chunks its GEMM and all-reduce run, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..group import Group
from ..process_group import find_process_group
from .calibration_cache import calibration_of
from .cost_model import MIN_ROWS, GemmShape

Overlap = Literal["auto"] | bool | int

# Below this many rows a chunked GEMM loses more than its all-reduce hides: kraken#19,
# pytorch#179770 and flux#79 report losses up to about 1k rows. Twice that leaves each of two
# chunks 1k rows. Published figures, not measured here.
GPU_MIN_ROWS = 2048
GPU_CHUNKS = 2  # two beat four at 8192 x 8192 bf16 on an H100 (nvFuser#5751)


@dataclass(frozen=True)
class Schedule:
    """How a GEMM and its all-reduce run.

    Attributes:
        chunks: row chunks.
        transport: what carries the all-reduce.
        reason: why, in words.
    """

    chunks: int
    transport: str
    reason: str


def check_overlap(overlap: object) -> None:
    """Raise ValueError unless `overlap` is "auto", False or an int of at least 1."""
    is_count = isinstance(overlap, int) and not isinstance(overlap, bool) and overlap >= 1
    if not is_count and overlap is not False and overlap != "auto":
        raise ValueError(
            "overlap must be 'auto', False (one chunk) or a number of row chunks >= 1, "
            f"got {overlap!r}"
        )


def choose(
    overlap: Overlap,
    m: int,
    row_bytes: int,
    group: Group,
    k: int | None = None,
    dtype: torch.dtype | None = None,
    weight_grad: bool = False,
) -> Schedule:
    """Choose the schedule of an all-reduce of m rows of `row_bytes` bytes.

    It is a function of what all ranks share, so that they never disagree.

    Args:
        overlap: "auto", False or a number of row chunks.
        m: rows.
        row_bytes: bytes of a row of the all-reduce.
        group: the tensor-parallel group.
        k: inner size of the largest rank's GEMM; None where the ranks' may differ unnoticed.
        dtype: of the GEMM. Without it no measurement applies.
        weight_grad: a weight gradient follows the GEMM.
    """
    if torch.compiler.is_compiling():
        return _choose_in_graph(overlap, m, row_bytes, group, k, dtype, weight_grad)
    return _choose(overlap, m, row_bytes, group, k, dtype, weight_grad)


def _choose(
    overlap: Overlap,
    m: int,
    row_bytes: int,
    group: Group,
    k: int | None,
    dtype: torch.dtype | None,
    weight_grad: bool,
) -> Schedule:
    calibration = calibration_of(group)
    timings = None
    if overlap == "auto" and group.size > 1 and calibration is not None and dtype is not None:
        timings = calibration.timings.get(dtype)
    goes_through_peers = 0 < m * row_bytes <= group.peer_memory.max_bytes
    if timings is None or goes_through_peers:
        return _published(overlap, m, row_bytes, group)
    if group.transport == "shm":
        reason = "the GEMM writes into the ranks' shared memory: one chunk, nothing to hide"
    elif k is None:
        reason = (
            "the ranks' shards may differ (no spec was passed): one chunk, which needs no agreement"
        )
    elif m == 0:
        reason = "no rows"
    else:
        shape = GemmShape(m, k, row_bytes // timings.itemsize, weight_grad)
        chunks, reason = timings.decide(shape)
        return Schedule(chunks, group.transport, reason)
    return Schedule(1, group.transport, reason)


def _choose_in_graph(overlap: Overlap, m: int, row_bytes: int, group: Group, *options) -> Schedule:
    """Choose under torch.compile, where m may be a symbol."""
    if overlap != "auto" or group.size == 1 or calibration_of(group) is None:
        return _published(overlap, m, row_bytes, group)
    if m < 2 * MIN_ROWS:  # one graph for all of them
        return Schedule(1, group.transport, "too few rows for two chunks")
    # Imported late, as it imports sympy: the compiler has it already.
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return _fixed_in_graph(int(guard_scalar(m)), row_bytes, group.name, group.device_type, *options)


def _fixed_in_graph(m: int, row_bytes: int, name: str, device_type: str, *options) -> Schedule:
    """Choose by the cost model, which torch.compile cannot trace.

    The choice is fixed in the graph, and the graph holds for these rows only.
    """
    return _choose("auto", m, row_bytes, Group(find_process_group(name), device_type), *options)


# torch.compiler.assume_constant_result would import the compiler: 1.2 s of `import tpkernels`.
vars(_fixed_in_graph)["_dynamo_marked_constant"] = True


def _published(overlap: Overlap, m: int, row_bytes: int, group: Group) -> Schedule:
    """Choose without measurements, from published figures."""
    nbytes, peer_memory = m * row_bytes, group.peer_memory
    fits_peers = 0 < nbytes <= peer_memory.max_bytes
    # More than one chunk asks for the pipeline, and the peer kernels are part of the stream.
    one_chunk = overlap in ("auto", False, 1)
    transport = "symm" if fits_peers and one_chunk else group.transport
    if group.size == 1:
        return Schedule(1, group.transport, "one rank: nothing to reduce")
    if overlap is False:
        return Schedule(1, transport, "overlap=False: one chunk")
    if overlap != "auto":
        return Schedule(overlap, transport, f"overlap={overlap} was asked for")
    if group.device_type == "cpu":
        reason = (
            "on CPUs the collective runs on the cores that the next chunk's GEMM needs: "
            "one chunk, until tpk.tune(group) has measured this link (it has not been run)"
        )
        return Schedule(1, group.transport, reason)
    if fits_peers:
        kind = "one-shot" if nbytes <= peer_memory.one_shot_bytes else "two-shot"
        reason = (
            f"{nbytes:,} bytes <= {peer_memory.max_bytes:,}: {kind} over peer memory "
            "(published, not measured)"
        )
        return Schedule(1, "symm", reason)
    if m < GPU_MIN_ROWS:
        reason = (
            f"{m} rows are fewer than {GPU_MIN_ROWS}: chunked GEMMs lose more than the overlap "
            "hides (published, not measured)"
        )
        return Schedule(1, group.transport, reason)
    reason = (
        f"{m} rows >= {GPU_MIN_ROWS}: {GPU_CHUNKS} chunks hide half of the all-reduce "
        "(published, not measured)"
    )
    return Schedule(GPU_CHUNKS, group.transport, reason)
