"""The number of threads changes no bit of what the CPU kernels give."""

import torch
from cpu_ops import OPS, dtypes, make


def everything(dtype):
    """Every op on input large enough for several threads."""
    torch.manual_seed(0)
    x, grad, residual = (make(300, 1000, dtype=dtype) for _ in range(3))
    bias, weight = make(1000, dtype=dtype), make(1000, dtype=dtype)
    target, seed = torch.randint(0, 1000, (300,)), torch.tensor(5)
    yield OPS.bias_act(x, bias, "gelu_tanh")
    yield from OPS.bias_act_backward(grad, x, bias, "gelu_tanh", True)
    yield from OPS.gated_act_backward(grad, x, residual, bias, weight, "swiglu", True)
    for rms in (False, True):
        y, total, mean, rstd = OPS.norm(x, residual, weight, None if rms else bias, 1e-5, rms)
        yield from (y, total, mean, rstd)
        yield from OPS.norm_backward(grad, residual, total, weight, mean, rstd, rms, True, not rms)
    stats = OPS.vocab_ce_stats(x, target, 0)
    yield stats
    yield OPS.vocab_ce_grad(
        x, target, stats[0] + stats[1].log(), torch.rand(300, dtype=stats.dtype), 0, 0.0, 1
    )
    yield OPS.dropout(x, seed, 0.1, 0, 0)
    angle = torch.randn(300, 25)
    yield OPS.rotary(x.view(1, 300, 20, 50).transpose(1, 2), angle.cos(), angle.sin(), False, False)
    OPS.add_bias_residual_(x, bias, residual)
    yield x


@dtypes
def test_threads_do_not_change_bits(dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(list(everything(dtype)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
