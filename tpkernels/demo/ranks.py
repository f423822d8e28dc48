"""The demo's ranks: one function trains with tpkernels, one with torch's own tensor parallelism."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..checkpoint.unsharded import unsharded_gradients
from ..mesh import init_mesh
from ..ops.collective_log import log_collectives
from ..parallelization.api import parallelize
from ..sharding.module import ShardedModule
from .model import generate, largest_difference, local_bytes, parameter_bytes, train


def launch(tp: int, function: Callable, *args) -> list[Any]:
    """Return `function(*args)` of `tp` processes, started as torchrun does.

    A rank that dies ends the others.
    """
    # Imported late: it brings an etcd client and more.
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


def _full_model(threads: int, folder: str):
    """Return the model on one rank, not sharded yet."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    import transformers  # not a dependency of tpkernels itself

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tpkernels_rank(
    folder: str, batches: torch.Tensor, prompt: torch.Tensor, steps: int, threads: int
) -> dict[str, Any]:
    """Shard the model, compare it with reference.pt in `folder`, and train it; return figures."""
    model = _full_model(threads, folder)
    mesh = init_mesh(tp=int(os.environ["WORLD_SIZE"]), device="cpu")
    stock_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parallelize(model, mesh["tp"], dtensor=False)
    out: dict[str, Any] = {
        "param_bytes": parameter_bytes(model),
        "split": _describe_shards(model, stock_shapes),
        "heads": _head_counts(model),
    }

    reference = torch.load(os.path.join(folder, "reference.pt"), mmap=True)
    with torch.no_grad():
        logits = model(batches[0]).logits
    out["max_logit_diff"] = (logits - reference["logits"]).abs().max().item()
    out["max_logit"] = reference["logits"].abs().max().item()
    out["generated"] = generate(model, prompt)

    with log_collectives() as log:
        loss = model(batches[0], labels=batches[0]).loss
        loss.backward()
    out["max_loss_rel_diff"] = abs(loss.item() - reference["loss"]) / reference["loss"]
    out["max_grad_rel_diff"] = largest_difference(unsharded_gradients(model), reference["grads"])
    out |= _count_collectives(log, model.config.num_hidden_layers)
    model.zero_grad()
    del reference

    title = f"Sharded over {dist.get_world_size()}: training steps"
    out["losses"], out["seconds_per_step"] = train(
        model,
        lambda ids: model(ids, labels=ids).loss,
        batches,
        steps,
        title,
        show=mesh.get_rank() == 0,
    )
    dist.barrier()
    dist.destroy_process_group()
    return out


def _count_collectives(log, blocks: int) -> dict[str, Any]:
    count, volume = Counter(entry.tag for entry in log), Counter()
    for entry in log:
        volume[entry.tag] += entry.bytes
    return {
        "all_reduces_per_block_forward": count["row_forward"] / blocks,
        "all_reduces_per_block_backward": count["column_backward"] / blocks,
        "collectives": {tag: {"count": count[tag], "bytes": volume[tag]} for tag in count},
    }


def _head_counts(model) -> tuple[int, int]:
    """Return the query and KV heads of this rank."""
    attention = model.model.layers[0].self_attn
    rank, head_dim = attention.q_proj.group.rank, attention.head_dim
    q_size, kv_size = (
        layer.out_spec.shard_sizes[rank] for layer in (attention.q_proj, attention.k_proj)
    )
    return q_size // head_dim, kv_size // head_dim


def _describe_shards(model, stock_shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Describe how the first block, the embedding and the norms are sharded.

    Returns:
        A row for each parameter, with the sizes of every rank's shard.
    """
    rows = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}"
            is_later_block = ".layers." in full_name and ".layers.0." not in full_name
            if full_name not in stock_shapes or is_later_block:
                continue
            spec = module.shard_specs.get(key) if isinstance(module, ShardedModule) else None
            shown_name = full_name.replace(".layers.0.", ".layers.*.")
            rows.append(
                {
                    "parameter": shown_name.removeprefix("model.").removesuffix(".weight"),
                    "shape": stock_shapes[full_name],
                    "split": "whole" if spec is None else ("rows", "columns")[spec.dim],
                    "sizes": None if spec is None else spec.shard_sizes,
                    "bytes": local_bytes(parameter),
                }
            )
    return rows


def dtensor_seconds(
    tp: int, heads: tuple[int, int], folder: str, batches: torch.Tensor, steps: int, threads: int
) -> tuple[list[float], float] | str:
    """Train under torch's own tensor parallelism; return losses and seconds, or why it cannot."""
    if tp == 1:
        return "one rank: nothing to shard"
    if any(count % tp for count in heads):
        return (
            f"torch's ColwiseParallel cannot shard {heads[0]} heads and {heads[1]} KV heads over "
            f"{tp} ranks: it needs sizes that the ranks divide"
        )
    return launch(tp, _dtensor_rank, folder, batches, min(steps, 3), threads)[0]


def _dtensor_rank(
    folder: str, batches: torch.Tensor, steps: int, threads: int
) -> tuple[list[float], float]:
    # Imported late: `tpkernels demo --help` does not pay for it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    model = _full_model(threads, folder)
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    plan: dict[str, Any] = {}
    for i in range(model.config.num_hidden_layers):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            plan[f"model.layers.{i}.{name}_proj"] = ColwiseParallel()
        for name in ("self_attn.o", "mlp.down"):
            plan[f"model.layers.{i}.{name}_proj"] = RowwiseParallel()
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, plan)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied, as before

    def loss_of(ids):
        labels = F.pad(ids, (0, 1), value=-100)[..., 1:].flatten()
        return F.cross_entropy(model(ids).logits.flatten(0, 1), labels)

    title = f"torch DTensor over {dist.get_world_size()}: training steps"
    with loss_parallel():
        result = train(model, loss_of, batches, steps, title, dist.get_rank() == 0)
    dist.destroy_process_group()
    return result
