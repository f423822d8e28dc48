"""Training steps for a profiler to record, on every rank.

`torchrun --nproc-per-node N benchmarks/profile_step.py {layer,block,demo}`
layer: RowParallelLinear; block: ParallelTransformerBlock; demo: SmolLM2 as `tpkernels demo` shards
it. The steps after the warm-up run between cudaProfilerStart and cudaProfilerStop, for which
`nsys profile --capture-range=cudaProfilerApi` waits (nsys.sh). On CPUs, over gloo, the same steps
are rehearsed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tpkernels as tpk

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PLACE: dict[str, Any] = dict(device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
SIZE = 8192 if CUDA else 256  # tokens, and features


def layer(group, args: argparse.Namespace) -> Callable[[], Tensor]:
    features = args.features
    row = tpk.nn.RowParallelLinear(features, features, group=group, overlap=args.overlap, **PLACE)
    x = torch.randn(args.tokens, row.weight.shape[1], requires_grad=True, **PLACE)
    return lambda: row(x)


def block(group, args: argparse.Namespace) -> Callable[[], Tensor]:
    heads = max(1, args.features // 64)
    options: dict[str, Any] = dict(group=group, overlap=args.overlap, **PLACE)
    module = tpk.nn.ParallelTransformerBlock(args.features, heads, **options)
    x = torch.randn(1, args.tokens, args.features, requires_grad=True, **PLACE)
    return lambda: module(x)


def demo(group, args: argparse.Namespace) -> Callable[[], Tensor]:
    from tpkernels.demo.model import find_weights, load_model

    model, _, batches, _ = load_model(find_weights())
    tpk.parallelize(model.to(**PLACE), group, overlap=args.overlap)
    ids = batches[0].to(DEVICE)
    return lambda: model(ids, labels=ids).loss


def step(forward: Callable[[], Tensor]) -> None:
    with tpk.profiling.range("forward"):
        y = forward()
    with tpk.profiling.range("backward"):
        y.backward(torch.ones_like(y))


def chunks(text: str) -> str | int:
    return text if text == "auto" else int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["layer", "block", "demo"])
    parser.add_argument("--tokens", type=int, default=SIZE, help="of layer and block")
    text = "of layer and block, 64 a head"
    parser.add_argument("--features", type=int, default=SIZE, help=text)
    parser.add_argument("--overlap", type=chunks, default="auto", help="auto, or row chunks")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the recorded ones")
    parser.add_argument("--steps", type=int, default=3, help="recorded")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    mesh = tpk.init_mesh(int(os.environ.get("WORLD_SIZE", 1)))
    forward = {"layer": layer, "block": block, "demo": demo}[args.what](mesh["tp"], args)
    for _ in range(args.warmup):
        step(forward)
    with torch.cuda.profiler.profile() if CUDA else contextlib.nullcontext():
        for _ in range(args.steps):
            with tpk.profiling.range("step"):
                step(forward)
        if CUDA:
            torch.cuda.synchronize()  # the capture ends at once: queued work would be lost
    if dist.get_rank() == 0:
        print(f"{args.what}: {args.steps} steps on {dist.get_world_size()} ranks, {DEVICE}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
