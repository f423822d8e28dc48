"""What bench_row_linear, bench_column_linear, bench_mlp and bench_block have in common: one layer, split by every contender."""

from __future__ import annotations

import contextlib
import os
import statistics

import stock
import timing
import torch
from measure import close
from torch.distributed._functional_collectives import AsyncCollectiveTensor

TOKENS, TRAINING_TOKENS = (1, 16, 128, 512, 4096), (1, 16, 128, 512)
PARTS = [
    "GEMM",
    "all-reduce",
    "tpkernels, overlap=False",
]  # measured beside the contenders; "tpkernels" itself is overlap="auto"
PEERS = ["torch", "torch.compile", "DTensor", "megatron-core", "fairscale", "vLLM"]
ALL_REDUCES = {
    "row": (1, 1),
    "column": (0, 1),
    "mlp": (1, 2),
    "block": (2, 4),
}  # forward, training step
VERIFY_TOKENS = 512  # the unsplit layer on one core takes seconds for more
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest value


def cases(mode: str, tokens=TOKENS, ranks: int = 2) -> list[dict]:
    return [
        dict(ranks=ranks, dtype=dtype, mode=mode, tokens=count)
        for dtype in ("float32", "bfloat16")
        for count in tokens
    ]


def run(module, x: torch.Tensor, mode: str, grad=None):
    """The call to time: forward without a graph, or forward and backward with fresh gradients."""

    def forward():
        with torch.no_grad():
            y = module(x)
            if isinstance(y, AsyncCollectiveTensor):
                y.trigger_wait()
            return y

    parameters = list(module.parameters())

    def training():
        for leaf in (*parameters, x):
            leaf.grad = None
        y = module(x)
        y.backward(grad)
        return y.detach()

    return forward if mode == "forward" else training


def bytes_of(module) -> int:
    local = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters())
    return sum(p.numel() * p.itemsize for p in local)


@contextlib.contextmanager
def both_cores(world):
    """All cores and as many threads; afterwards one of each again. OpenMP's threads get the cores of the one that starts them."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, world.cores)
    torch.set_num_threads(len(world.cores))
    try:
        yield
    finally:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, mine)


def build(world, what: str, hidden: int, dtype: torch.dtype, name: str, full):
    """A contender's module for `what`, this rank's share of `full`."""
    peer, _, option = name.partition(", ")
    if name == "GEMM":
        return world.peers["tpkernels"].gemms(what, full)
    options = {"": {}, "overlap=False": {"overlap": False}, "4 chunks": {"overlap": 4}}[option]
    return getattr(world.peers[peer], what)(full, **options)


def contenders(
    world,
    names: list[str],
    what: str,
    dtype: str,
    mode: str,
    tokens: int,
    hidden: int = stock.HIDDEN,
) -> dict:
    dtype = getattr(torch, dtype)
    place = dict(device=world.device, dtype=dtype)
    kept = world.keep((what, hidden, dtype), dict)
    if "full" not in kept:
        kept["full"] = stock.make(what, hidden, **place)
    full = kept["full"]
    torch.manual_seed(tokens)
    shape = (
        (1, tokens, hidden)
        if what == "block"
        else (tokens, 4 * hidden if what == "row" else hidden)
    )
    x = torch.randn(shape, **place)
    grad = torch.randn(*shape[:-1], 4 * hidden if what == "column" else hidden, **place)
    split_x = x.chunk(world.size, -1)[world.rank].contiguous() if what == "row" else x
    split_grad = grad.chunk(world.size, -1)[world.rank].contiguous() if what == "column" else grad
    training, made = mode == "training", {}

    if tokens <= VERIFY_TOKENS:
        leaf = x.clone().requires_grad_(training)
        expected = run(full, leaf, mode, grad)()
        expected = expected.chunk(world.size, -1)[world.rank] if what == "column" else expected
        expected_grad = (
            (leaf.grad.chunk(world.size, -1)[world.rank] if what == "row" else leaf.grad)
            if training
            else None
        )
        for parameter in full.parameters():
            parameter.grad = None

    for name in names:
        if name == "all-reduce":
            if count := ALL_REDUCES[what][training]:
                buffers = [torch.zeros(tokens, hidden, **place)] * count
                made[name] = timing.Contender(
                    lambda buffers=buffers: [*map(world.peers["tpkernels"].all_reduce, buffers)]
                )
            continue
        if name == "one process":
            if world.device == "cpu":
                leaf = x.clone().requires_grad_(training)
                call = run(full, leaf, mode, grad)
                around = lambda: both_cores(world)  # noqa: E731
                made[name] = timing.Contender(
                    call, alone=True, around=around, memory={"parameters": bytes_of(full)}
                )
            continue
        if name not in kept:
            before = timing.resident(world.device)
            kept[name] = module = build(world, what, hidden, dtype, name, full)
            module(split_x[..., :1, :] if split_x.dim() > 2 else split_x[:1])
            kept[f"{name} memory"] = {
                "parameters": bytes_of(module),
                "resident": timing.resident(world.device) - before,
            }
        leaf = split_x.clone().requires_grad_(training)
        call = run(kept[name], leaf, mode, split_grad)

        def verify(call=call, leaf=leaf):
            close(call(), expected, TOLERANCE[dtype])
            if training:
                close(leaf.grad, expected_grad, TOLERANCE[dtype])

        checked = tokens <= VERIFY_TOKENS and name != "GEMM"
        made[name] = timing.Contender(
            call, verify if checked else None, memory=dict(kept[f"{name} memory"])
        )
    return made


def components(rounds: dict) -> dict:
    """Seconds; "hidden": the overlap efficiency, a share."""
    median = {
        name: statistics.median(timing.medians(times)) for name, times in rounds.items() if times[0]
    }
    found = {"overlapped": median["tpkernels"]}
    for key, name in (
        ("GEMM", "GEMM"),
        ("all-reduce", "all-reduce"),
        ("serial", "tpkernels, overlap=False"),
    ):
        if name in median:
            found[key] = median[name]
    if "GEMM" in found and "all-reduce" in found:
        found["ideal"] = max(found["GEMM"], found["all-reduce"])
        found["hidden"] = timing.hidden_share(
            found["GEMM"], found["all-reduce"], found["overlapped"]
        )
    return found
