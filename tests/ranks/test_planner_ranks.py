"""The planner against runs on 1, 2 and 4 ranks: the memory that they hold, and a plan's mesh."""

import functools
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from pool import run_on_ranks

import tpkernels as tpk
from tpkernels_planner import Job, Layout, Model
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.memory import memory
from tpkernels_planner.model_config import gpt_model, llama_model


def saved_bytes(forward, parameters):
    """Return the bytes that a forward keeps for its backward pass, and its result.

    The parameters do not count, nor does the fused loss's gradient of the embedding, which becomes
    the parameter's.
    """
    parameters = list(parameters)
    own = {p.untyped_storage().data_ptr() for p in parameters}
    table = parameters[0].shape
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.shape != table:
            seen[storage.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return sum(t.untyped_storage().nbytes() for t in seen.values()), out


class Whole(torch.nn.Module):
    def __init__(self, model: Model, dtype):
        super().__init__()
        norm = "rmsnorm" if model.gated else "layernorm"
        options = dict(group=dist.group.WORLD, dtype=dtype)
        self.embedding = tpk.nn.VocabParallelEmbedding(model.vocab, model.hidden, **options)
        self.blocks = torch.nn.ModuleList(
            tpk.nn.ParallelTransformerBlock(
                model.hidden,
                model.heads,
                model.ffn,
                model.kv_heads,
                activation="swiglu" if model.gated else "gelu",
                norm=norm,
                bias=not model.gated,
                **options,
            )
            for _ in range(model.layers)
        )
        self.norm = (tpk.nn.RMSNorm if model.gated else tpk.nn.LayerNorm)(model.hidden, dtype=dtype)
        self.model = model

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        weight = self.embedding.weight
        return tpk.functional.vocab_parallel_linear_cross_entropy(
            self.norm(x), weight, ids, group=dist.group.WORLD, num_classes=self.model.vocab
        )


def traced(gated, kv_heads, dtype):
    """Return the predicted and the real bytes that a rank holds."""
    made = llama_model if gated else gpt_model
    model = replace(made(64, 3, 8, 500, kv_heads, 256), tied=True, positions=0)
    module = Whole(model, dtype)
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    job = Job(model, load_hardware("cpu"), 32, name, "tpkernels")
    layout = Layout(tp=dist.get_world_size(), micro_batch=4, global_batch=4)
    predicted = memory(job, layout)
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    activations, loss = saved_bytes(lambda: module(ids), module.parameters())
    loss.backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in module.parameters())
    adam = torch.optim.AdamW(module.parameters())
    adam.step()
    state = sum(
        t.numel() * t.element_size() for s in adam.state.values() for t in s.values() if t.dim()
    )
    return asdict(predicted), dict(
        parameters=parameters, gradients=gradients, optimizer=state, activations=activations
    )


@pytest.mark.parametrize("gated, kv_heads", [(False, None), (True, 4)])
@run_on_ranks(1, 2, 4)
def test_memory_is_what_a_run_holds(gated, kv_heads):
    predicted, real = traced(gated, kv_heads, torch.float32)
    for part in ("parameters", "gradients", "optimizer"):
        assert predicted[part] == real[part], part
    assert predicted["activations"] == pytest.approx(real["activations"], rel=0.03)
    assert sum(predicted.values()) == pytest.approx(sum(real.values()), rel=0.1)
    predicted, real = traced(gated, kv_heads, torch.bfloat16)
    assert predicted["parameters"] == real["parameters"]
    assert predicted["activations"] == pytest.approx(real["activations"], rel=0.03)


@run_on_ranks(1, 2)
def test_memory_of_recomputation():
    """Recomputed blocks keep their inputs, and one block's own activations."""
    model = replace(gpt_model(64, 3, 8, 500, ffn=256), tied=True, positions=0)
    job = Job(model, load_hardware("cpu"), 32, "float32", "tpkernels")
    layout = Layout(tp=dist.get_world_size(), micro_batch=4, global_batch=4)
    module = Whole(model, torch.float32)
    x = torch.randn(4, 32, 64, requires_grad=True)
    inside, _ = saved_bytes(lambda: module.blocks[0](x), module.parameters())
    for block in module.blocks:
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    kept, _ = saved_bytes(lambda: module(ids), module.parameters())
    predicted = memory(job, replace(layout, recompute="full")).activations
    assert predicted == pytest.approx(kept + inside, rel=0.05)


@run_on_ranks(2)
def test_plan_is_a_layout_for_init_mesh():
    made = tpk.plan("smollm2-135m", gpus=2, gpu="cpu", global_batch=8, seq=256)
    assert (made.tp, made.pp, made.dp) == (1, 1, 2)
    mesh = tpk.init_mesh(made, device="cpu")
    deep = replace(made, rows=(replace(made.best, layout=Layout(pp=2, global_batch=8)),))
    with pytest.raises(ValueError, match="pp=2"):
        tpk.init_mesh(deep, device="cpu")
    assert dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) == {"dp": 2, "tp": 1}
