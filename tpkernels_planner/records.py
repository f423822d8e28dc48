"""Predictions as dictionaries, for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .collectives import traffic
from .search import LayoutChoice, Prediction


def prediction_record(row: Prediction) -> dict[str, Any]:
    """Return a prediction's numbers, in seconds, bytes and FLOP/s."""
    layout = row.layout
    job = row.job
    carried = traffic(job, layout)
    return {
        "model": {
            "name": job.model.name,
            "parameters": job.model.parameters,
            "flops_per_step": row.step_flops,
        },
        "gpu": job.hardware.name,
        "gpus": layout.gpus,
        "seq": job.seq,
        "dtype": job.dtype,
        "software": job.software,
        "layout": asdict(layout),
        "step_s": row.step_s,
        "step_parts_s": asdict(row.time),
        "tokens_per_s": row.tokens_per_s,
        "tflops_per_gpu": row.flops_per_gpu / 1e12,
        "hardware_tflops_per_gpu": row.hardware_flops_per_gpu / 1e12,
        "mfu": row.mfu,
        "memory_bytes": row.memory.total,
        "memory_parts_bytes": asdict(row.memory),
        "fits": row.fits,
        "traffic": {name: collective._asdict() for name, collective in carried.items()},
    }


def choice_record(choice: LayoutChoice, sentences: list[str], top: int) -> dict[str, Any]:
    """Return a choice with its advice and its first `top` predictions."""
    return {
        "gpus": choice.gpus,
        "global_batch": choice.global_batch,
        "advice": sentences,
        "rows": [prediction_record(row) for row in choice.rows[:top]],
    }
