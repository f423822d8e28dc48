"""What do the fused kernels gain over eager torch? On a GPU where there is one, else on the CPU.

`pytest benchmarks/bench_fused.py` times each; `python benchmarks/bench_fused.py [--threads N] [--only NAME]` times the two in blocks that
alternate and prints the ratio of the medians. [M, N] = [512, 2048] on CPUs, [8192, 8192] on GPUs; a vocabulary of 32000 for the loss.
"""

import argparse
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import tpkernels  # noqa: F401  (registers the ops)

OPS = torch.ops.tpkernels
CUDA = torch.cuda.is_available()
ROWS, COLUMNS = (8192, 8192) if CUDA else (512, 2048)
VOCABULARY, HEADS, ROUNDS = 32000, 32, 41
DTYPES = (torch.float32, torch.bfloat16)


def gradient(output, grad, *inputs):
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def activations(dtype):
    for name in ("relu", "gelu", "gelu_tanh", "silu"):
        x, bias, grad = (
            torch.randn(*shape, dtype=dtype)
            for shape in ((ROWS, COLUMNS), (COLUMNS,), (ROWS, COLUMNS))
        )
        torchs = {
            "relu": F.relu,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
        }[name]
        yield (
            f"bias+{name}",
            lambda f=torchs, x=x, b=bias: f(x + b),
            lambda n=name, x=x, b=bias: OPS.bias_act(x, b, n),
        )
        xg, bg = x.clone().requires_grad_(), bias.clone().requires_grad_()
        ours = lambda n=name, g=grad, x=x, b=bias: OPS.bias_act_backward(g, x, b, n, True)  # noqa: E731
        yield f"bias+{name} backward", gradient(torchs(xg + bg), grad, xg, bg), ours
    gate, up, grad = (torch.randn(ROWS, COLUMNS, dtype=dtype) for _ in range(3))
    yield "swiglu", lambda: F.silu(gate) * up, lambda: OPS.gated_act(gate, up, None, None, "swiglu")
    gg, ug = gate.clone().requires_grad_(), up.clone().requires_grad_()
    ours = lambda: OPS.gated_act_backward(grad, gate, up, None, None, "swiglu", False)  # noqa: E731
    yield "swiglu backward", gradient(F.silu(gg) * ug, grad, gg, ug), ours


def norms(dtype):
    x, residual, grad = (torch.randn(ROWS, COLUMNS, dtype=dtype) for _ in range(3))
    weight, bias = torch.randn(COLUMNS, dtype=dtype), torch.randn(COLUMNS, dtype=dtype)
    size = (COLUMNS,)
    xg, wg, bg = (t.clone().requires_grad_() for t in (x, weight, bias))
    for rms in (False, True):
        name, b, leaves = (
            ("rms_norm", None, (xg, wg)) if rms else ("layer_norm", bias, (xg, wg, bg))
        )
        torchs = (
            (lambda x, w, b: F.rms_norm(x, size, w, 1e-5))
            if rms
            else (lambda x, w, b: F.layer_norm(x, size, w, b, 1e-5))
        )
        yield (
            name,
            lambda f=torchs: f(x, weight, bias),
            lambda b=b, r=rms: OPS.norm(x, None, weight, b, 1e-5, r),
        )
        yield (
            f"residual+{name}",
            lambda f=torchs: f(x + residual, weight, bias),
            lambda b=b, r=rms: OPS.norm(x, residual, weight, b, 1e-5, r),
        )
        _, _, mean, rstd = OPS.norm(x, None, weight, b, 1e-5, rms)

        def ours(m=mean, s=rstd, r=rms):
            return OPS.norm_backward(grad, None, x, weight, m, s, r, True, not r)

        yield f"{name} backward", gradient(torchs(xg, wg, bg), grad, *leaves), ours


def others(dtype):
    logits, target = (
        torch.randn(ROWS, VOCABULARY, dtype=dtype),
        torch.randint(0, VOCABULARY, (ROWS,)),
    )
    ones = torch.ones(ROWS)

    def stats():
        z = logits.float()
        top = z.amax(1)
        return torch.stack(
            [
                top,
                (z - top[:, None]).exp().sum(1),
                z.gather(1, target[:, None]).squeeze(1),
                z.sum(1),
            ]
        )

    def grad():
        p = (logits.float() - norm[:, None]).exp()
        p[torch.arange(ROWS), target] -= 1
        return (p * ones[:, None]).to(dtype)

    top, total, _, _ = stats()
    norm = top + total.log()
    yield "vocab_ce_stats", stats, lambda: OPS.vocab_ce_stats(logits, target, 0)
    yield "vocab_ce_grad", grad, lambda: OPS.vocab_ce_grad(logits, target, norm, ones, 0, 1.0, 0.0)

    x, seed = torch.randn(ROWS, COLUMNS, dtype=dtype), torch.tensor(1)
    yield "dropout", lambda: F.dropout(x, 0.1), lambda: OPS.dropout(x, seed, 0.1, 0, 0)

    q = x.view(1, ROWS, HEADS, COLUMNS // HEADS).transpose(1, 2)
    angle = torch.randn(ROWS, COLUMNS // HEADS // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(x):  # as Hugging Face's models do
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)

    yield "rotary", lambda: rotate(q), lambda: OPS.rotary(q, cos, sin, False, False)
    yield "rotary interleaved", lambda: rotate(q), lambda: OPS.rotary(q, cos, sin, True, False)
    bias = torch.randn(COLUMNS, dtype=dtype)
    y, residual = x.clone(), torch.zeros_like(x)
    yield (
        "bias+residual",
        lambda: (y + bias).add_(residual),
        lambda: OPS.add_bias_residual_(y, bias, residual),
    )


def cases(dtype):
    """(name, eager torch's call, ours)"""
    for make in (activations, norms, others):
        yield from make(dtype)


def finished(call):
    """The call and, on a GPU, the wait for it."""
    return (lambda: (call(), torch.cuda.synchronize())) if CUDA else call


with torch.device("meta"):
    NAMES = [name for name, *_ in cases(torch.float32)]


@pytest.mark.parametrize("which", ["eager", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_fused(benchmark, name, dtype, which):
    benchmark.group = f"{name} {str(dtype)[6:]}"
    with torch.device("cuda" if CUDA else "cpu"):
        eager, fused = next(calls for found, *calls in cases(dtype) if found == name)
        benchmark.pedantic(
            finished({"eager": eager, "fused": fused}[which]), rounds=ROUNDS, warmup_rounds=5
        )


def paired(first, second):
    """Median ms of each, in blocks of calls that alternate. A block's first calls are not counted: they find the heap as the other left
    it, trimmed or not, and pay for its pages."""
    times = ([], [])
    for _ in range(ROUNDS // 4):
        for call, results in zip((first, second), times, strict=True):
            for i in range(8):
                start = time.perf_counter()
                call()
                if i >= 3:
                    results.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(results) for results in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="the ops whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = (
        torch.cuda.get_device_name()
        if CUDA
        else f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)"
    )
    print(f"torch {torch.__version__}, {where}, [{ROWS}, {COLUMNS}], median ms")
    torch.set_default_device("cuda" if CUDA else "cpu")
    for dtype in DTYPES:
        for name, eager, fused in cases(dtype):
            if options.only in name:
                a, b = paired(finished(eager), finished(fused))
                print(
                    f"{str(dtype)[6:]:9} {name:28} eager {a:7.3f}  fused {b:7.3f}  {a / b:5.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
