"""A schedule in words and figures."""

from __future__ import annotations

import torch

from ..group import Group
from . import choose
from .model import Shape, chunk_rows
from .table import installed


def explain(
    overlap,
    rows: int,
    features: int,
    group: Group,
    inner: int,
    dtype: torch.dtype,
    weight_grad: bool,
) -> str:
    """What `choose` gives for an all-reduce of [rows, features], the alternatives with their times, and what those rest on."""
    row_bytes = features * dtype.itemsize
    schedule = choose(overlap, rows, row_bytes, group, inner, dtype, weight_grad)
    sizes = chunk_rows(rows, schedule.chunks, row_bytes)
    lines = [
        f"one all-reduce of [{rows}, {features}] {dtype}, {rows * row_bytes:,} bytes, over {group.size} ranks",
        f"schedule: {len(sizes)} chunk{'s' if len(sizes) > 1 else ''} of {', '.join(map(str, sizes))} rows, over {schedule.transport}",
        f"why: {schedule.reason}",
    ]
    table = installed(group)
    if table is not None and dtype in table.dtypes and rows > 0 and group.size > 1:
        timings, shape = table.dtypes[dtype], Shape(rows, inner, features, weight_grad)
        predicted, measured = timings.predict(shape), timings.measured.get(shape, {})
        work = f"GEMM {1e3 * timings.gemm(rows, inner, features):.4g} ms, all-reduce {1e3 * timings.messages(rows * row_bytes):.4g} ms"
        lines += [
            f"alone, predicted: {work}{', and the weight gradient as long as the GEMM' if weight_grad else ''}"
        ]
        lines += ["chunks  predicted ms  measured ms"]
        for chunks, seconds in predicted.items():
            real = f"{1e3 * measured[chunks]:11.4g}" if chunks in measured else f"{'-':>11}"
            lines.append(
                f"{chunks:6}  {1e3 * seconds:12.4g}  {real}{'  <' if chunks == schedule.chunks else ''}"
            )
        lines.append(f"measured: {table.date}, on {table.place}")
    elif group.size > 1:
        why = (
            "tpk.tune(group) has not been run"
            if table is None
            else f"tpk.tune did not measure {dtype}"
        )
        lines.append(f"measured: nothing, {why}")
    if group.device_type == "cuda" and not group.has_chunked_group:
        lines.append(
            "group: it has no communicator of high stream priority for chunks, as one made by tpk.init_mesh has; theirs may queue behind GEMMs"
        )
    return "\n".join(lines)
