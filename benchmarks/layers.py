"""The cases of bench_row_linear, bench_column_linear, bench_mlp and bench_block.

Each is one layer, sharded by every contender.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import stock
import timing
import torch
from measure import close
from peers.registry import OUR_ALL_REDUCE, OUR_GEMM
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

TOKENS, TRAINING_TOKENS = (1, 16, 128, 512, 4096), (1, 16, 128, 512)
# Measured beside the contenders; "tpkernels" itself is overlap="auto".
PARTS = ["GEMM", "all-reduce", "tpkernels, overlap=False"]
# Plain layers with tpkernels' all-reduce, and with its GEMM too. From torch to the first is the
# gain of the transport, to the second that of the GEMM, to tpkernels that of the fused op.
STEPS = [OUR_ALL_REDUCE, OUR_GEMM]
PEERS = ["torch", "torch.compile", "DTensor", "megatron-core", "fairscale", "vLLM"]
# All-reduces of a layer's forward pass and of its training step.
ALL_REDUCES = {"row": (1, 1), "column": (0, 1), "mlp": (1, 2), "block": (2, 4)}
VERIFY_TOKENS = 512  # the unsharded layer on one core takes seconds for more
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest value
OPTIONS = {"": {}, "overlap=False": {"overlap": False}, "4 chunks": {"overlap": 4}}


def cases(mode: str, tokens: tuple[int, ...] = TOKENS, ranks: int = 2) -> list[dict]:
    return [
        dict(ranks=ranks, dtype=dtype, mode=mode, tokens=count)
        for dtype in ("float32", "bfloat16")
        for count in tokens
    ]


def call_of(module: nn.Module, x: Tensor, grad: Tensor | None) -> Callable[[], Tensor]:
    """Returns the call to time: a training step with fresh gradients, or forward without a graph.

    Args:
        grad: the output's gradient; None for forward.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            y = module(x)
            if isinstance(y, AsyncCollectiveTensor):
                y.trigger_wait()
            return y

    parameters = list(module.parameters())

    def training() -> Tensor:
        for leaf in (*parameters, x):
            leaf.grad = None
        y = module(x)
        y.backward(grad)
        return y.detach()

    return forward if grad is None else training


def bytes_of(module: nn.Module) -> int:
    """Returns the bytes of this rank's parameters."""
    total = 0
    for parameter in module.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total += local.numel() * local.itemsize
    return total


@contextlib.contextmanager
def all_cores(world) -> Iterator[None]:
    """Gives the process all cores and as many threads; afterwards one of each again.

    OpenMP's threads get the cores of the thread that starts them.
    """
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, world.cores)
    torch.set_num_threads(len(world.cores))
    try:
        yield
    finally:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, own)


@dataclass
class Case:
    """One layer on this rank: its input, and its results where they are checked.

    Attributes:
        kind: row, column, mlp or block.
        full: the unsharded module.
        x: its input; grad: the gradient of its output, None for forward.
        expected: this rank's part of its output, and expected_grad of its input's gradient.
    """

    world: Any
    kind: str
    full: nn.Module
    x: Tensor
    grad: Tensor | None
    expected: Tensor | None = None
    expected_grad: Tensor | None = None

    def part(self, tensor: Tensor, sharded_by: str) -> Tensor:
        """Returns this rank's features if the layer is of the kind that shards them, else all."""
        if self.kind != sharded_by:
            return tensor
        return tensor.chunk(self.world.size, -1)[self.world.rank].contiguous()

    def leaf(self, x: Tensor) -> Tensor:
        return x.clone().requires_grad_(self.grad is not None)

    def expect(self) -> None:
        """Runs the unsharded module for the results that every contender must have."""
        leaf = self.leaf(self.x)
        output = call_of(self.full, leaf, self.grad)()
        self.expected = self.part(output, "column")
        if leaf.grad is not None:
            self.expected_grad = self.part(leaf.grad, "row")
        self.full.zero_grad()

    def contender(self, name: str, kept: dict) -> timing.Contender:
        """Returns a contender of that name; its module is made once and kept."""
        x = self.part(self.x, "row")
        if name not in kept:
            before = timing.resident(self.world.device)
            kept[name] = module = self.build(name)
            module(x[..., :1, :])
            resident = timing.resident(self.world.device) - before
            kept[f"{name} memory"] = {"parameters": bytes_of(module), "resident": resident}
        leaf = self.leaf(x)
        grad = None if self.grad is None else self.part(self.grad, "column")
        call = call_of(kept[name], leaf, grad)

        def verify() -> None:
            tolerance = TOLERANCE[x.dtype]
            close(call(), self.expected, tolerance)
            if leaf.requires_grad:
                close(leaf.grad, self.expected_grad, tolerance)

        checked = verify if self.expected is not None and name != "GEMM" else None
        return timing.Contender(call, checked, memory=dict(kept[f"{name} memory"]))

    def build(self, name: str) -> nn.Module:
        """Returns a contender's module, this rank's shard of the full one."""
        peer, _, option = name.partition(", ")
        if name == "GEMM":
            return self.world.peers["tpkernels"].gemms(self.kind, self.full)
        return getattr(self.world.peers[peer], self.kind)(self.full, **OPTIONS[option])

    def all_reduces(self, tokens: int, hidden: int) -> timing.Contender | None:
        """Returns the layer's all-reduces alone, or None if it makes none."""
        count = ALL_REDUCES[self.kind][self.grad is not None]
        if count == 0:
            return None
        buffer = torch.zeros(tokens, hidden, device=self.x.device, dtype=self.x.dtype)
        all_reduce = self.world.peers["tpkernels"].all_reduce

        def call() -> None:
            for _ in range(count):
                all_reduce(buffer)

        return timing.Contender(call)

    def one_process(self) -> timing.Contender | None:
        """Returns the unsharded module on all cores while the other ranks sleep; CPUs only."""
        if self.world.device != "cpu":
            return None
        return timing.Contender(
            call_of(self.full, self.leaf(self.x), self.grad),
            alone=True,
            around=lambda: all_cores(self.world),
            memory={"parameters": bytes_of(self.full)},
        )


def contenders(
    world,
    names: list[str],
    kind: str,
    dtype: str,
    mode: str,
    tokens: int,
    hidden: int = stock.HIDDEN,
) -> dict[str, timing.Contender]:
    """Returns the contenders of a case by name, without those that do not apply to it.

    Args:
        kind: row, column, mlp or block.
        mode: "forward" or "training".
    """
    place: dict[str, Any] = dict(device=world.device, dtype=getattr(torch, dtype))
    kept = world.keep((kind, hidden, dtype), dict)
    if "full" not in kept:
        kept["full"] = stock.make(kind, hidden, **place)
    torch.manual_seed(tokens)
    batch = (1, tokens) if kind == "block" else (tokens,)
    x = torch.randn(*batch, 4 * hidden if kind == "row" else hidden, **place)
    grad = torch.randn(*batch, 4 * hidden if kind == "column" else hidden, **place)
    case = Case(world, kind, kept["full"], x, grad if mode == "training" else None)
    if tokens <= VERIFY_TOKENS:
        case.expect()
    made = {}
    for name in names:
        if name == "all-reduce":
            made[name] = case.all_reduces(tokens, hidden)
        elif name == "one process":
            made[name] = case.one_process()
        else:
            made[name] = case.contender(name, kept)
    return {name: contender for name, contender in made.items() if contender is not None}


def components(rounds: dict[str, timing.Rounds]) -> dict[str, Any]:
    """Returns the parts of a layer's time, in seconds, and the gains on the way from torch.

    "hidden" is the overlap efficiency, a share; "gains" has the ratio of each step's time to the
    next one's: all-reduce, GEMM and fused op.
    """
    median = {
        name: statistics.median(timing.medians(times)) for name, times in rounds.items() if times[0]
    }
    found: dict[str, Any] = {"overlapped": median["tpkernels"]}
    for key, name in (
        ("GEMM", "GEMM"),
        ("all-reduce", "all-reduce"),
        ("serial", "tpkernels, overlap=False"),
    ):
        if name in median:
            found[key] = median[name]
    if "GEMM" in found and "all-reduce" in found:
        parts = found["GEMM"], found["all-reduce"]
        found["ideal"] = max(parts)
        found["hidden"] = timing.hidden_share(*parts, found["overlapped"])
    steps = ["torch", *STEPS, "tpkernels"]
    if rounds.keys() >= set(steps):
        gains = zip(("all-reduce", "GEMM", "fused op"), steps, steps[1:], strict=False)
        found["gains"] = {gain: timing.ratio(rounds[a], rounds[b]) for gain, a, b in gains}
    return found
