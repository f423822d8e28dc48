"""A schedule in words and figures."""

from __future__ import annotations

import torch

from ..group import Group
from .calibration_cache import Calibration, calibration_of
from .cost_model import GemmShape, chunk_rows
from .schedule import Overlap, Schedule, choose


def explain(overlap: Overlap, shape: GemmShape, group: Group, dtype: torch.dtype) -> str:
    """Describe the schedule of an all-reduce, the alternatives with their times, and the reason.

    Args:
        overlap: the layer's option.
        shape: the GEMM whose result [m, n] is all-reduced.
        group: the tensor-parallel group.
        dtype: of the GEMM and the all-reduce.
    """
    m, k, n, weight_grad = shape
    row_bytes = n * dtype.itemsize
    schedule = choose(overlap, m, row_bytes, group, k, dtype, weight_grad)
    rows = chunk_rows(m, schedule.chunks, row_bytes)
    plural = "s" if len(rows) > 1 else ""
    lines = [
        f"one all-reduce of [{m}, {n}] {dtype}, {m * row_bytes:,} bytes, over {group.size} ranks",
        f"schedule: {len(rows)} chunk{plural} of {', '.join(map(str, rows))} rows, "
        f"over {schedule.transport}",
        f"why: {schedule.reason}",
    ]
    if group.size > 1:
        lines += _alternatives(calibration_of(group), shape, dtype, schedule)
    if group.device_type == "cuda" and not group.has_chunked_group:
        lines.append(
            "group: it has no communicator of high stream priority for chunks, as one made by "
            "tpk.init_mesh has; theirs may queue behind GEMMs"
        )
    return "\n".join(lines)


def _alternatives(
    calibration: Calibration | None, shape: GemmShape, dtype: torch.dtype, schedule: Schedule
) -> list[str]:
    if calibration is None:
        return ["measured: nothing, tpk.tune(group) has not been run"]
    timings = calibration.timings.get(dtype)
    if timings is None:
        return [f"measured: nothing, tpk.tune did not measure {dtype}"]
    m, k, n, weight_grad = shape
    if m == 0:
        return []
    gemm_ms = 1e3 * timings.gemm(m, k, n)
    all_reduce_ms = 1e3 * timings.all_reduces(m * n * timings.itemsize)
    alone = f"alone, predicted: GEMM {gemm_ms:.4g} ms, all-reduce {all_reduce_ms:.4g} ms"
    if weight_grad:
        alone += ", and the weight gradient as long as the GEMM"
    lines = [alone, "chunks  predicted ms  measured ms"]
    measured = timings.measured.get(shape, {})
    for chunks, seconds in timings.predict(shape).items():
        measured_ms = f"{1e3 * measured[chunks]:.4g}" if chunks in measured else "-"
        mark = "  <" if chunks == schedule.chunks else ""
        lines.append(f"{chunks:6}  {1e3 * seconds:12.4g}  {measured_ms:>11}{mark}")
    lines.append(f"measured: {calibration.date}, on {calibration.measured_on}")
    return lines
