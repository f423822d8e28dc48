"""run_demo: the reference, the ranks and the comparison. Every figure is measured in the run."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tpkernels_planner.files import write_atomically

from .model import (
    BATCH,
    TOKENS,
    console,
    find_weights,
    generate,
    largest_difference,
    load_model,
    parameter_bytes,
    train,
)
from .ranks import dtensor_seconds, launch, tpkernels_rank
from .report import print_report


def run_demo(tp: int, steps: int, path: Path | None) -> dict[str, Any]:
    """Run the demo on `tp` processes and print its tables.

    Args:
        tp: ranks.
        steps: training steps.
        path: file for the figures, or None.

    Returns:
        The figures.

    Raises:
        ValueError: tp or steps below 1, more ranks than heads.
        RuntimeError: a package is missing, a rank failed.
    """
    if tp < 1 or steps < 1:
        raise ValueError(f"tp and steps must be at least 1, got tp={tp}, steps={steps}")
    weights = find_weights()
    cores = os.cpu_count() or 1
    threads = max(1, cores // tp)
    with tempfile.TemporaryDirectory(prefix="tpkernels-demo-") as folder:
        with console.status("Loading SmolLM2-135M-Instruct (dequantising its GGUF weights) ..."):
            model, tokenizer, batches, prompt = load_model(weights)
            model.save_pretrained(folder)
        heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
        if tp > heads[0]:
            raise ValueError(
                f"tp={tp}: the model has {heads[0]} attention heads, and each rank needs at least "
                f"one; use 1 to {heads[0]}"
            )
        plural = "s" if tp > 1 else ""
        console.print(
            f"SmolLM2-135M-Instruct: {heads[0]} heads, {heads[1]} KV heads, "
            f"over {tp} rank{plural}; {cores} cores in all"
        )
        reference = _reference(model, batches, prompt, steps, folder, tp)
        del model
        ranks = launch(tp, tpkernels_rank, folder, batches, prompt, steps, threads)
        dtensor = dtensor_seconds(tp, heads, folder, batches, steps, threads)
    result = _figures(tp, steps, reference, ranks, dtensor)
    result["generated_text"] = tokenizer.decode(result["generated"])
    print_report(result, [rank["heads"] for rank in ranks])
    if path is not None:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    return result


def _figures(tp: int, steps: int, reference: dict, ranks: list[dict], dtensor) -> dict[str, Any]:
    first = ranks[0]
    is_measured = not isinstance(dtensor, str)
    return {
        "tp": tp,
        "steps": steps,
        "max_logit_diff": first["max_logit_diff"],
        "max_logit": first["max_logit"],
        "max_loss_rel_diff": first["max_loss_rel_diff"],
        "max_grad_rel_diff": first["max_grad_rel_diff"],
        "losses": first["losses"],
        "reference_losses": reference["losses"],
        "reference_grad_rel_error": reference["grad_error"],
        "all_reduces_per_block_forward": first["all_reduces_per_block_forward"],
        "all_reduces_per_block_backward": first["all_reduces_per_block_backward"],
        "collectives": first["collectives"],
        "param_bytes": [rank["param_bytes"] for rank in ranks],
        "param_bytes_unsharded": reference["param_bytes"],
        "split": first["split"],
        "generated": first["generated"],
        "reference_generated": reference["generated"],
        "generated_text": "",
        "seconds_per_step": first["seconds_per_step"],
        "reference_seconds_per_step": reference["seconds_per_step"],
        "dtensor_seconds_per_step": dtensor[1] if is_measured else None,
        "dtensor_losses": dtensor[0] if is_measured else None,
        "dtensor_note": None if is_measured else dtensor,
        "tokens_per_step": BATCH * TOKENS,
        "machine": {
            "cores": os.cpu_count() or 1,
            "processor": platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _reference(model, batches, prompt, steps: int, folder: str, tp: int) -> dict[str, Any]:
    """Run the unsharded model, alone on all cores; leave its logits and gradients in `folder`."""
    with console.status("Unsharded model: logits, gradients, generation ..."):
        with torch.no_grad():
            logits = model(batches[0]).logits
        generated = generate(model, prompt)
        stock_loss = model(batches[0], labels=batches[0]).loss
        stock_loss.backward()
        stock_grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        # torch's float32 log_softmax over 49,152 classes is off by 9e-6, which some gradients show
        # as 1e-3. Gradients are held against the same model with its cross entropy in float64.
        labels = F.pad(batches[0], (0, 1), value=-100)[..., 1:].flatten()
        F.cross_entropy(model(batches[0]).logits.flatten(0, 1).double(), labels).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        stock_error = largest_difference(stock_grads, grads)
        wanted = stock_grads if tp == 1 else grads  # one rank keeps the stock loss
        torch.save(
            {"logits": logits, "loss": stock_loss.item(), "grads": wanted},
            os.path.join(folder, "reference.pt"),
        )
        model.zero_grad()
    losses, seconds = train(
        model,
        lambda ids: model(ids, labels=ids).loss,
        batches,
        steps,
        "Unsharded model: training steps",
        True,
    )
    return {
        "losses": losses,
        "seconds_per_step": seconds,
        "generated": generated,
        "param_bytes": parameter_bytes(model),
        "grad_error": stock_error,
    }
