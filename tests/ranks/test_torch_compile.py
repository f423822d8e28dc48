"""torch.compile takes layers and functions whole, without graph breaks."""

import families
import torch
import torch.distributed as dist
from helpers import assert_same_grads, grads_of
from pool import run_on_ranks
from torch.testing import assert_close
from user_models import llama_pair

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import ParallelMLP


@run_on_ranks(1)
def test_torch_compile_takes_them_whole():
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    mlp = ParallelMLP(16, 24, activation="gelu", group=dist.group.WORLD)
    tables, seed = tpf.rotary_tables(3, 4), torch.tensor([4])
    for name, function in {
        "bias_act": lambda x: tpf.bias_act(x, bias, "gelu"),
        "gated_act": lambda x: tpf.gated_act(x, x * 2, "swiglu"),
        "rms_norm": lambda x: tpf.rms_norm(x, weight, residual=x * 2)[0],
        "layer_norm": lambda x: tpf.layer_norm(x, weight, bias),
        "dropout": lambda x: tpf.dropout(x, 0.5, seed),
        "rotary": lambda x: tpf.rotary(x.view(1, 2, 3, 16), *tables),
        "mlp": mlp,
    }.items():
        x = torch.randn(6, 16)
        assert_close(
            grads_of(torch.compile(function, fullgraph=True, backend="aot_eager"), [x]),
            grads_of(function, [x]),
            msg=name,
        )


@run_on_ranks(2)
def test_torch_compile():
    """A whole model with graph breaks at its hooks, an MLP of ours without any."""
    stock, model = llama_pair()
    ids, labels = families.batch()
    torch.compile(model, backend="aot_eager")(ids, labels=labels).loss.backward()
    stock(ids, labels=labels).loss.backward()
    assert_same_grads(stock, model)
    torch.manual_seed(0)
    mlp, x = (
        tpk.nn.ParallelMLP(8, 24, activation="swiglu", group=dist.group.WORLD),
        torch.randn(6, 8, requires_grad=True),
    )
    torch.compile(mlp, backend="aot_eager", fullgraph=True)(x).sum().backward()
    grads = [x.grad, *(p.grad for p in mlp.parameters())]
    for tensor in (x, *mlp.parameters()):
        tensor.grad = None
    mlp(x).sum().backward()
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(grads, (x.grad, *(p.grad for p in mlp.parameters())), strict=True)
    )
