"""Training steps for a profiler to record, on every rank: `torchrun --nproc-per-node N benchmarks/profile_step.py {layer,block,demo}`.

layer: RowParallelLinear; block: ParallelTransformerBlock; demo: SmolLM2 as `tpkernels demo` splits it. The steps after the warm-up
run between cudaProfilerStart and cudaProfilerStop, which `nsys profile --capture-range=cudaProfilerApi` waits for (nsys.sh). On
CPUs, over gloo, this rehearses the same steps.
"""

import argparse
import contextlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

import tpkernels as tpk

CUDA = torch.cuda.is_available()
PLACE = (
    dict(device="cuda", dtype=torch.bfloat16) if CUDA else dict(device="cpu", dtype=torch.float32)
)


def layer(group, args) -> Callable:
    row = tpk.nn.RowParallelLinear(
        args.features, args.features, group=group, overlap=args.overlap, **PLACE
    )
    x = torch.randn(args.tokens, row.in_split.sizes[dist.get_rank()], requires_grad=True, **PLACE)
    return lambda: row(x)


def block(group, args) -> Callable:
    heads = max(1, args.features // 64)
    module = tpk.nn.ParallelTransformerBlock(
        args.features, heads, group=group, overlap=args.overlap, **PLACE
    )
    x = torch.randn(1, args.tokens, args.features, requires_grad=True, **PLACE)
    return lambda: module(x)


def demo(group, args) -> Callable:
    from tpkernels.demo import _find_weights, _load

    model, _, batches, _ = _load(_find_weights())
    tpk.parallelize(model.to(**PLACE), group, overlap=args.overlap)
    ids = batches[0].to(PLACE["device"])
    return lambda: model(ids, labels=ids).loss


def step(forward: Callable) -> None:
    with tpk.profiling.range("forward"):
        y = forward()
    with tpk.profiling.range("backward"):
        y.backward(torch.ones_like(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["layer", "block", "demo"])
    parser.add_argument(
        "--tokens", type=int, default=8192 if CUDA else 256, help="of layer and block"
    )
    parser.add_argument(
        "--features", type=int, default=8192 if CUDA else 256, help="of layer and block, 64 a head"
    )
    parser.add_argument(
        "--overlap",
        type=lambda text: text if text == "auto" else int(text),
        default="auto",
        help="auto, or row chunks",
    )
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="recorded")
    args = parser.parse_args()

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
            torch.cuda.synchronize()  # the capture ends at once: what is still queued would be lost
    if dist.get_rank() == 0:
        print(
            f"{args.what}: {args.steps} steps on {dist.get_world_size()} ranks, {PLACE['device']}"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
