"""The gain of the fused kernels over eager torch: on a GPU if there is one, else on the CPU.

`pytest benchmarks/bench_fused.py` times each. `python benchmarks/bench_fused.py [--threads N]
[--only NAME]` times the two in blocks that alternate and prints the ratio of the medians.
[M, N] is [512, 2048] on CPUs, [8192, 8192] on GPUs; the loss has a vocabulary of 32000.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tpkernels  # noqa: F401  (registers the ops)

OPS = torch.ops.tpkernels
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
M, N = (8192, 8192) if CUDA else (512, 2048)
VOCABULARY, HEADS, ROUNDS = 32000, 32, 41
DTYPES = (torch.float32, torch.bfloat16)
EAGER_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
Call = Callable[[], object]
Pair = tuple[str, Call, Call]  # name, eager torch's call, ours


def gradient(output: Tensor, grad: Tensor, *inputs: Tensor) -> Call:
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def bias_activation(name: str, dtype: torch.dtype) -> Iterator[Pair]:
    x, grad = (torch.randn(M, N, dtype=dtype) for _ in range(2))
    bias, eager = torch.randn(N, dtype=dtype), EAGER_ACTIVATIONS[name]
    yield f"bias+{name}", lambda: eager(x + bias), lambda: OPS.bias_act(x, bias, name)
    xg, bg = x.clone().requires_grad_(), bias.clone().requires_grad_()
    eager_backward = gradient(eager(xg + bg), grad, xg, bg)
    ours = lambda: OPS.bias_act_backward(grad, x, bias, name, True)  # noqa: E731
    yield f"bias+{name} backward", eager_backward, ours


def activations(dtype: torch.dtype) -> Iterator[Pair]:
    for name in EAGER_ACTIVATIONS:
        yield from bias_activation(name, dtype)
    gate, up, grad = (torch.randn(M, N, dtype=dtype) for _ in range(3))
    yield "swiglu", lambda: F.silu(gate) * up, lambda: OPS.gated_act(gate, up, None, None, "swiglu")
    gg, ug = gate.clone().requires_grad_(), up.clone().requires_grad_()
    ours = lambda: OPS.gated_act_backward(grad, gate, up, None, None, "swiglu", False)  # noqa: E731
    yield "swiglu backward", gradient(F.silu(gg) * ug, grad, gg, ug), ours


def norm(rms: bool, dtype: torch.dtype) -> Iterator[Pair]:
    x, residual, grad = (torch.randn(M, N, dtype=dtype) for _ in range(3))
    weight = torch.randn(N, dtype=dtype)
    bias = None if rms else torch.randn(N, dtype=dtype)
    name = "rms_norm" if rms else "layer_norm"

    def eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if rms:
            return F.rms_norm(x, (N,), weight, 1e-5)
        return F.layer_norm(x, (N,), weight, bias, 1e-5)

    def ours(residual: Tensor | None) -> tuple[Tensor, ...]:
        return OPS.norm(x, residual, weight, bias, 1e-5, rms)

    yield name, lambda: eager(x, weight, bias), lambda: ours(None)
    yield f"residual+{name}", lambda: eager(x + residual, weight, bias), lambda: ours(residual)
    _, _, mean, rstd = ours(None)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    output = eager(leaves[0], leaves[1], None if rms else leaves[2])
    yield (
        f"{name} backward",
        gradient(output, grad, *leaves),
        lambda: OPS.norm_backward(grad, None, x, weight, mean, rstd, rms, True, not rms),
    )


def norms(dtype: torch.dtype) -> Iterator[Pair]:
    for rms in (False, True):
        yield from norm(rms, dtype)


def losses(dtype: torch.dtype) -> Iterator[Pair]:
    logits = torch.randn(M, VOCABULARY, dtype=dtype)
    target = torch.randint(0, VOCABULARY, (M,))
    ones = torch.ones(M)

    def stats() -> Tensor:
        z = logits.float()
        top = z.amax(1)
        total = (z - top[:, None]).exp().sum(1)
        return torch.stack([top, total, z.gather(1, target[:, None]).squeeze(1), z.sum(1)])

    def grad() -> Tensor:
        p = (logits.float() - log_sum[:, None]).exp()
        p[torch.arange(M), target] -= 1
        return (p * ones[:, None]).to(dtype)

    top, total, _, _ = stats()
    log_sum = top + total.log()
    yield "vocab_ce_stats", stats, lambda: OPS.vocab_ce_stats(logits, target, 0)
    ours = lambda: OPS.vocab_ce_grad(logits, target, log_sum, ones, 0, 0.0, 1)  # noqa: E731
    yield "vocab_ce_grad", grad, ours


def others(dtype: torch.dtype) -> Iterator[Pair]:
    x, seed = torch.randn(M, N, dtype=dtype), torch.tensor(1)
    yield "dropout", lambda: F.dropout(x, 0.1), lambda: OPS.dropout(x, seed, 0.1, 0, 0)
    q = x.view(1, M, HEADS, N // HEADS).transpose(1, 2)
    angle = torch.randn(M, N // HEADS // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(x: Tensor) -> Tensor:  # as Hugging Face's models do
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)

    yield "rotary", lambda: rotate(q), lambda: OPS.rotary(q, cos, sin, False, False)
    yield "rotary interleaved", lambda: rotate(q), lambda: OPS.rotary(q, cos, sin, True, False)
    bias = torch.randn(N, dtype=dtype)
    y, residual = x.clone(), torch.zeros_like(x)
    ours = lambda: OPS.add_bias_residual_(y, bias, residual)  # noqa: E731
    yield "bias+residual", lambda: (y + bias).add_(residual), ours


def cases(dtype: torch.dtype) -> Iterator[Pair]:
    for make in (activations, norms, losses, others):
        yield from make(dtype)


def finished(call: Call) -> Call:
    """Returns the call and, on a GPU, the wait for it."""

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait if CUDA else call


with torch.device("meta"):
    NAMES = [name for name, *_ in cases(torch.float32)]


@pytest.mark.parametrize("which", ["eager", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_fused(benchmark, name, dtype, which):
    benchmark.group = f"{name} {str(dtype)[6:]}"
    with torch.device(DEVICE):
        eager, fused = next(calls for found, *calls in cases(dtype) if found == name)
        call = finished(fused if which == "fused" else eager)
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=5)


def paired(first: Call, second: Call) -> list[float]:
    """Returns the median milliseconds of each call, in blocks that alternate.

    A block's first calls are not counted: they find the heap as the other call left it, trimmed or
    not, and pay for its pages.
    """
    times: tuple[list[float], ...] = ([], [])
    for _ in range(ROUNDS // 4):
        for call, results in zip((first, second), times, strict=True):
            for i in range(8):
                start = time.perf_counter()
                call()
                if i >= 3:
                    results.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(results) for results in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="the ops whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)"
    if CUDA:
        where = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, [{M}, {N}], median ms")
    torch.set_default_device(DEVICE)
    for dtype in DTYPES:
        for name, eager, fused in cases(dtype):
            if options.only in name:
                a, b = paired(finished(eager), finished(fused))
                label = f"{str(dtype)[6:]:9} {name:28}"
                print(f"{label} eager {a:7.3f}  fused {b:7.3f}  {a / b:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
