"""The fused ops' CPU and device-agnostic implementations against plain torch, on every instruction set of this machine."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import tpkernels  # noqa: F401  (registers the ops)

OPS = torch.ops.tpkernels
ACTIVATIONS = ["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]
GATED = {"swiglu": "silu", "geglu": "gelu"}
COLUMNS = [0, 1, 7, 17, 33, 129]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# ---- the ops' plain-torch twins -------------------------------------------------------------------------------------------------


def activate(x, activation):
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"relu": F.relu, "relu2": lambda x: F.relu(x).square(), "gelu": F.gelu, "silu": F.silu}[
        activation
    ](x)


def bias_act(input, bias, activation):
    x = input if bias is None else input + bias
    if activation not in GATED:
        return activate(x, activation)
    gate, up = x.chunk(2, -1)
    return activate(gate, GATED[activation]) * up


def gated_act(gate, up, gate_bias, up_bias, activation):
    gate, up = (x if b is None else x + b for x, b in ((gate, gate_bias), (up, up_bias)))
    return activate(gate, GATED[activation]) * up


def norm(input, residual, weight, bias, eps, rms):
    """The normalised tensor and the sum that it was made of."""
    h = input if residual is None else input + residual
    centred = h if rms else h - h.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), h


def vocab_ce_stats(logits, target, first):
    rows, columns = logits.shape
    top = logits.amax(1) if columns else logits.new_full((rows,), -torch.inf)
    exp = (logits - top.clamp_min(torch.finfo(logits.dtype).min)[:, None]).exp()
    local = target - first
    inside = (local >= 0) & (local < columns)
    at_target = torch.zeros_like(top)
    at_target[inside] = logits[inside, local[inside]]
    return torch.stack([top, exp.sum(1), at_target, logits.sum(1)])


def vocab_ce_grad(logits, target, log_norm, scale, vocab_start_index, smoothing, num_classes):
    columns = vocab_start_index + torch.arange(logits.shape[1])
    grad = (
        (logits - log_norm[:, None]).exp()
        - smoothing / num_classes
        - (1 - smoothing) * (columns == target[:, None]).to(logits.dtype)
    )
    return torch.where(scale[:, None] == 0, 0, grad * scale[:, None])


def philox(seed, row, column):
    """The 32 random bits of one element: Philox4x32-7, in Python's integers."""
    low = 2**32 - 1
    key, counter = (
        [seed & low, seed >> 32 & low],
        [column // 4 & low, row & low, row >> 32 & low, 0],
    )
    for _ in range(7):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter[column % 4]


def dropout(input, seed, p, row, column):
    rows, columns = input.numel() // max(input.shape[-1], 1), input.shape[-1]
    bits = [[philox(int(seed), row + r, column + c) for c in range(columns)] for r in range(rows)]
    kept = torch.tensor(bits, dtype=torch.int64).view(input.shape) >= round(p * 2**32)
    wide = input if input.dtype == torch.float64 else input.float()
    return torch.where(kept, wide * (1 / (1 - p) if p < 1 else 0.0), 0.0).to(input.dtype)


def rotary(input, cos, sin, interleaved, inverse):
    half = cos.shape[-1]
    cos, sin = (t.unsqueeze(-3) for t in (cos, -sin if inverse else sin))
    head, rest = input.split([2 * half, input.shape[-1] - 2 * half], -1)
    x1, x2 = (
        (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    )
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.cat(
        [torch.stack([y1, y2], -1).flatten(-2) if interleaved else torch.cat([y1, y2], -1), rest],
        -1,
    )


# ---- how they are compared ------------------------------------------------------------------------------------------------------


def wide(t):
    """In float64, which is exact enough to be the truth."""
    return (
        t.detach().double().requires_grad_(t.requires_grad)
        if torch.is_tensor(t) and t.is_floating_point()
        else t
    )


def check(outs, twin, args):
    """The numerics rule: outs against twin(*args), computed in float64 and in the arguments' own dtype, the slack for values near 1."""
    truths, plains = twin(*map(wide, args)), twin(*args)
    assert len(outs) == len(truths) == len(plains)
    for out, truth, plain in zip(outs, truths, plains, strict=True):
        assert out.shape == truth.shape and out.dtype in (plain.dtype, torch.float32)
        slack = 1e-13 if plain.dtype == torch.float64 else 1e-6
        if out.numel():
            error, allowed = ((x.double() - truth).abs().max() for x in (out, plain))
            slack *= max(1, truth.abs().max())
            assert error < 2 * allowed + slack, (
                f"error {error:.2e}, torch in {plain.dtype}: {allowed:.2e}"
            )


def with_grads(function):
    """function's twin that returns its gradients for the tensors that require them; the last argument is its output's gradient."""

    def backward(*args):
        *args, grad = args
        leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
        return torch.autograd.grad(function(*args), leaves, grad)

    return backward


def make(*shape, dtype=torch.float32, layout="contiguous", grad=False):
    *leading, columns = shape
    if layout == "half":  # one of two halves packed in a row
        t = torch.randn(*leading, 2 * columns)[..., columns:]
    elif layout == "transposed" and leading:
        t = torch.randn(*leading[:-1], columns, leading[-1]).mT
    else:
        t = torch.randn(*shape)
    return (2 * t).to(dtype).requires_grad_(grad)


def detached(*args):
    return [a.detach() if torch.is_tensor(a) else a for a in args]


class Eager:
    """The ops as a device without kernels of its own runs them."""

    def __getattr__(self, name):
        return functools.partial(
            getattr(OPS, name).default.redispatch,
            torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1),
        )


@pytest.fixture(params=[OPS, Eager()], ids=["kernel", "eager"])
def ops(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


CASES = [((6,), n, "contiguous") for n in COLUMNS]
CASES += [
    ((), 33, "half"),
    ((2, 3), 17, "half"),
    ((2, 9), 33, "transposed"),
    ((0,), 7, "transposed"),
    ((200,), 129, "half"),
]
cases = pytest.mark.parametrize("leading,columns,layout", CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


# ---- activations ----------------------------------------------------------------------------------------------------------------


@dtypes
@cases
@activations
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_bias_act(ops, activation, with_bias, leading, columns, layout, dtype):
    width = columns * (2 if activation in GATED else 1)
    x = make(*leading, width, dtype=dtype, layout=layout, grad=True)
    bias = make(width, dtype=dtype, grad=True) if with_bias else None
    grad = make(*leading, columns, dtype=dtype, layout=layout)
    check(
        [ops.bias_act(*detached(x, bias), activation)],
        lambda *a: [bias_act(*a)],
        (x, bias, activation),
    )
    grads = ops.bias_act_backward(grad, *detached(x, bias), activation, with_bias)
    check(grads, with_grads(bias_act), (x, bias, activation, grad))


@dtypes
@cases
@pytest.mark.parametrize("activation", list(GATED))
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_gated_act(ops, activation, with_bias, leading, columns, layout, dtype):
    gate, up = (make(*leading, columns, dtype=dtype, layout=layout, grad=True) for _ in range(2))
    biases = [make(columns, dtype=dtype, grad=True) if with_bias else None for _ in range(2)]
    grad = make(*leading, columns, dtype=dtype, layout=layout)
    check(
        [ops.gated_act(*detached(gate, up, *biases), activation)],
        lambda *a: [gated_act(*a)],
        (gate, up, *biases, activation),
    )
    grads = ops.gated_act_backward(grad, *detached(gate, up, *biases), activation, with_bias)
    check(grads, with_grads(gated_act), (gate, up, *biases, activation, grad))


@dtypes
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_bias_act_exact(ops, activation, dtype):
    x, bias, grad = (torch.randint(-4, 5, shape).to(dtype) for shape in [(5, 33), (33,), (5, 33)])
    x, bias = x.requires_grad_(), bias.requires_grad_()
    torch.testing.assert_close(
        ops.bias_act(*detached(x, bias), activation),
        bias_act(*detached(x, bias), activation),
        rtol=0,
        atol=0,
    )
    grads = ops.bias_act_backward(grad, *detached(x, bias), activation, True)
    for ours, torchs in zip(grads, with_grads(bias_act)(x, bias, activation, grad), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0)


def test_activations_of_large_input():
    x = torch.tensor(
        [-torch.inf, -1e4, -90.0, -12.0, -0.0, 0.0, 12.0, 90.0, 1e4, torch.inf, torch.nan]
    )
    for activation in ("relu", "relu2", "gelu", "gelu_tanh", "silu"):
        out = OPS.bias_act(x, None, activation)
        # Where torch's own kernels are taken, an infinity gives what they give: NaN for gelu on some instruction sets.
        kept = (
            slice(1, None) if torch.backends.cpu.get_cpu_capability() == "AVX512" else x.isfinite()
        )
        torch.testing.assert_close(
            out[kept].double(),
            activate(x.double(), activation)[kept],
            atol=1e-6,
            rtol=1e-6,
            equal_nan=True,
        )
        (grad,) = OPS.bias_act_backward(torch.ones(8), x[1:-2].clone(), None, activation, False)
        assert grad.isfinite().all()


@activations
@pytest.mark.parametrize("keep", [False, True])
def test_column_linear_act(ops, activation, keep):
    x, weight, bias = make(2, 3, 16), make(34, 16), make(34)
    out, linear = ops.column_linear_act(x, weight, bias, activation, keep)
    check([out], lambda x, w, b, a: [bias_act(x @ w.t(), b, a)], (x, weight, bias, activation))
    torch.testing.assert_close(linear, x @ weight.t() if keep else torch.empty(0))


def test_unknown_activation(ops):
    with pytest.raises(ValueError, match="tanh"):
        ops.bias_act(torch.ones(3), None, "tanh")


# ---- norms ----------------------------------------------------------------------------------------------------------------------


@dtypes
@cases
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("with_residual,with_weight", [(False, False), (True, True), (False, True)])
def test_norm(ops, rms, with_residual, with_weight, leading, columns, layout, dtype):
    x = make(*leading, columns, dtype=dtype, layout=layout, grad=True)
    residual = make(*leading, columns, dtype=dtype) if with_residual else None
    weight = make(columns, dtype=dtype, grad=True) if with_weight else None
    bias = make(columns, dtype=dtype, grad=True) if with_weight and not rms else None
    eps = 1e-5
    y, total, mean, rstd = ops.norm(*detached(x, residual, weight, bias), eps, rms)
    h = x.detach() if residual is None else (x + residual).detach()
    assert torch.equal(total, h if with_residual else h.new_empty(0))
    rows, statistic = h.numel() // max(columns, 1), h.double().reshape(-1, max(columns, 1))
    if columns:
        assert rstd.shape == (rows,) and mean.shape == (0,) if rms else (rows,)
        if not rms:
            torch.testing.assert_close(mean.double(), statistic.mean(1), atol=1e-6, rtol=1e-5)
            statistic = statistic - statistic.mean(1, keepdim=True)
        torch.testing.assert_close(
            rstd.double(), (statistic.square().mean(1) + eps).rsqrt(), atol=1e-6, rtol=1e-4
        )
    check([y], lambda *a: [norm(*a)[0]], (h, None, weight, bias, eps, rms))
    if columns < 2:  # LayerNorm of one column is constant: its gradient is rounding
        return
    grad, grad_sum = (
        make(*leading, columns, dtype=dtype, layout=layout),
        make(*leading, columns, dtype=dtype),
    )
    args = (
        grad,
        grad_sum if with_residual else None,
        h,
        weight.detach() if with_weight else None,
        mean,
        rstd,
    )
    grads = ops.norm_backward(*args, rms, with_weight, bias is not None)

    def backward(h, weight, bias, grad, grad_sum):
        leaves = [t for t in (h, weight, bias) if t is not None]
        out, _ = norm(h, None, weight, bias, eps, rms)
        dh, *rest = torch.autograd.grad(out, leaves, grad)
        return [dh + grad_sum if with_residual else dh, *rest]

    check(grads, backward, (h.clone().requires_grad_(), weight, bias, grad, grad_sum))


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_norm_keeps_float_weights(ops, rms):
    x, weight, grad = make(4, 33, dtype=torch.bfloat16), make(33), make(4, 33, dtype=torch.bfloat16)
    y, _, mean, rstd = ops.norm(x, None, weight, None, 1e-5, rms)
    expected, _ = norm(x.float(), None, weight, None, 1e-5, rms)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16())
    dx, dweight = ops.norm_backward(grad, None, x, weight, mean, rstd, rms, True, False)
    assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32


# ---- cross-entropy --------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "half", "transposed"])
@pytest.mark.parametrize("columns", [*COLUMNS, 2500])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_vocab_ce(ops, columns, index, layout, dtype):
    rows, first = 9, 40
    logits = make(rows, columns, dtype=dtype, layout=layout)
    target = torch.randint(0, first + 2 * columns + 5, (rows,), dtype=index)
    target[:2] = torch.tensor([-100, first])
    stats = ops.vocab_ce_stats(logits, target, first)
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = vocab_ce_stats(logits.double(), target, first)
    torch.testing.assert_close(stats.double(), expected, rtol=2e-6, atol=1e-4)
    exact = [0, 2]
    assert torch.equal(stats[exact].double(), expected[exact])
    log_norm, scale = (stats[0] + stats[1].log(), torch.rand(rows, dtype=stats.dtype))
    scale[3], log_norm[3] = 0, torch.nan
    args = (logits, target, log_norm, scale, first, 0.1, 100)
    grad = ops.vocab_ce_grad(*args)
    assert not grad[3].any()
    check([grad], lambda *a: [vocab_ce_grad(*a).to(a[0].dtype)], args)
    ops.vocab_ce_grad_(*args)
    assert torch.equal(logits, grad)


def test_vocab_ce_of_minus_infinity(ops):
    logits = torch.randn(3, 70)
    logits[0], logits[1, 3:], logits[2, :40] = -torch.inf, -torch.inf, -torch.inf
    target = torch.tensor([0, 1, 69])
    stats = ops.vocab_ce_stats(logits, target, 0)
    torch.testing.assert_close(stats, vocab_ce_stats(logits, target, 0))
    assert stats[0, 0] == -torch.inf and stats[1, 0] == 0
    grad = ops.vocab_ce_grad(
        logits, target, stats[0] + stats[1].log(), torch.tensor([0.0, 1.0, 1.0]), 0, 0.0, 1
    )
    assert grad.isfinite().all() and not grad[0].any()
    torch.testing.assert_close(grad.sum(1), torch.zeros(3), atol=1e-6, rtol=0)


# ---- dropout --------------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    "leading,columns", [((3,), n) for n in COLUMNS] + [((), 5), ((2, 2), 9), ((0,), 4)]
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_is_philox(ops, p, leading, columns, layout, dtype):
    x, seed = make(*leading, columns, dtype=dtype, layout=layout), torch.tensor(-(2**62) + 12345)
    for row, column in ((0, 0), (2**33 + 1, 6), (5, 2**32 * 4 - 9)):
        assert torch.equal(ops.dropout(x, seed, p, row, column), dropout(x, seed, p, row, column))


def test_dropout_of_a_slice_is_the_slice_of_the_whole(ops):
    x, seed = make(40, 100), torch.tensor([77])
    whole = ops.dropout(x, seed, 0.5, 0, 0)
    for rows, columns in (((3, 20), (0, 100)), ((0, 40), (50, 100)), ((7, 8), (33, 71))):
        part = x[slice(*rows), slice(*columns)]
        assert torch.equal(
            ops.dropout(part, seed, 0.5, rows[0], columns[0]), whole[slice(*rows), slice(*columns)]
        )


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_its_share(ops, p):
    x, n = torch.ones(1000, 1000), 1e6
    out = ops.dropout(x, torch.tensor(3), p, 0, 0)
    kept = (out != 0).sum().item()
    assert abs(kept - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    assert not torch.equal(out, ops.dropout(x, torch.tensor(4), p, 0, 0))
    assert not ops.dropout(torch.full((2, 50), torch.nan), torch.tensor(3), 1.0, 0, 0).any()


# ---- rotary ---------------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "features,rotated", [(16, 16), (34, 34), (80, 20), (6, 2), (8, 0), (128, 128)]
)
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed", "dbth"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(ops, interleaved, layout, features, rotated, dtype):
    batch, heads, steps = 2, 3, 5
    if layout == "bhtd":
        x = make(batch, heads, steps, features, dtype=dtype)
    elif layout == "bthd":
        x = make(batch, steps, heads, features, dtype=dtype).transpose(1, 2)
    elif layout == "packed":  # q of [q, k, v]
        x = make(batch, steps, 3 * heads, features, dtype=dtype)[:, :, :heads].transpose(1, 2)
    else:
        x = make(features, batch, steps, heads, dtype=dtype).permute(1, 3, 2, 0)
    for shape in ((steps, rotated // 2), (batch, steps, rotated // 2)):
        angle = torch.randn(shape, dtype=torch.float64)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for inverse in (False, True):
            out = ops.rotary(x, cos, sin, interleaved, inverse)
            assert out.stride() == torch.empty_like(x).stride()
            check([out], lambda *a: [rotary(*a)], (x, cos, sin, interleaved, inverse))
    wider = ops.rotary(x, cos.double(), sin.double(), interleaved, True)
    assert wider.dtype == dtype and torch.equal(wider, out)


def test_rotary_of_nothing(ops):
    x = torch.empty(2, 0, 5, 8)
    assert ops.rotary(x, torch.ones(5, 4), torch.ones(5, 4), False, False).shape == x.shape


# ---- threads, instruction sets --------------------------------------------------------------------------------------------------


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


CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.parametrize(
    "capability",
    CAPABILITIES[: CAPABILITIES.index(torch.backends.cpu.get_cpu_capability().lower())],
)
@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ, reason="is itself the run on a lower instruction set"
)
def test_lower_instruction_sets(capability):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not eager",
        __file__,
    ]
    run = subprocess.run(
        command,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-3000:]
