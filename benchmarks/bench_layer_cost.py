"""What does a layer itself cost, at one token, where nothing else takes long? Beside bare F.linear, and with a gradient beside its
all-reduce too."""

from __future__ import annotations

import layers
import stock
import timing
import torch
import torch.nn.functional as F
from measure import close

FEATURES = 64  # hidden; the row layer is [4 * 64 / ranks, 64]
CONTENDERS = ["tpkernels", "by hand", "DTensor", "megatron-core", "fairscale"]
CASES = [
    dict(ranks=ranks, layer=layer, mode=mode)
    for ranks, mode in ((1, "forward"), (2, "training"))
    for layer in ("row", "column")
]
SMOKE = CASES[-1:]


def by_hand(world, layer: str, mode: str, weight, bias, x, grad):
    """The least that gives the layer's result and leaves a graph behind: F.linear and, where the layer has one, its all-reduce."""
    all_reduce = world.peers["tpkernels"].all_reduce

    def forward():
        with torch.no_grad():
            return F.linear(x, weight, bias)

    def training():
        weight.grad = bias.grad = x.grad = None
        y = F.linear(x, weight, bias)
        if layer == "row":
            all_reduce(y.detach())
        y.backward(grad)
        if layer == "column":
            all_reduce(x.grad)
        return y

    return forward if mode == "forward" else training


def contenders(world, names: list[str], layer: str, mode: str) -> dict[str, timing.Contender]:
    names = [name for name in names if name != "by hand"]
    made = layers.contenders(world, names, layer, "float32", mode, 1, FEATURES)
    full = stock.make(layer, FEATURES, torch.float32, world.device)
    dim, training = (1, mode == "training") if layer == "row" else (0, mode == "training")
    weight = (
        full.weight.detach().chunk(world.size, dim)[world.rank].clone().requires_grad_(training)
    )
    bias = (
        (full.bias.detach().chunk(world.size)[world.rank] if dim == 0 else full.bias.detach())
        .clone()
        .requires_grad_(training)
    )
    x = torch.randn(1, weight.shape[1], device=world.device, requires_grad=training)
    call = by_hand(
        world, layer, mode, weight, bias, x, torch.randn(1, weight.shape[0], device=world.device)
    )
    expected = F.linear(x, weight, bias).detach()
    verify = (lambda: close(call(), expected, 1e-5)) if world.size == 1 else None
    return made | {"by hand": timing.Contender(call, verify)}


def components(rounds: dict) -> dict:
    """Seconds."""
    return {"own cost": timing.difference(rounds["tpkernels"], rounds["by hand"])["median"]}


def test_layer_cost(replay):
    replay()
