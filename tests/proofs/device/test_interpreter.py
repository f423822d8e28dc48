"""interpreter.py and traffic.py, each check in a process that interprets Triton.

Functions with a leading underscore run there.
"""

from __future__ import annotations

import pytest
from workers import pool


@pytest.fixture(scope="module")
def run():
    """run(function): its result, in a process in which the interpreter is patched."""
    with pool(1, interpret=True) as workers:
        workers.submit(_install).result(timeout=300)
        yield lambda function, *args: workers.submit(function, *args).result(timeout=300)


@pytest.fixture(scope="module")
def run_stock():
    """The same with Triton's interpreter as it is."""
    with pool(1, interpret=True) as workers:
        yield lambda function, *args: workers.submit(function, *args).result(timeout=300)


def _install():
    from interpreter import install

    install()


def _difference(out, expected) -> float:
    """0 if equal to the bit, NaN in the same places."""
    import torch

    assert out.dtype == expected.dtype
    same = (out == expected) | (out.isnan() & expected.isnan())
    return (
        0.0
        if bool(same.all())
        else (out.double() - expected.double())[~same].abs().nan_to_num(torch.inf).max().item()
    )


def _corner_cases():
    """float32: ties both ways, NaNs whose payload is in the low bits alone, infinities, overflow by
    rounding, subnormals, signed zeros.
    """
    import torch

    bits = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F807FFF,
        0x7F800001,
        0xFF800001,
        0x7FC00000,
        0x7F800000,
        0xFF800000,
        0x7F7FFFFF,
    ]
    bits += [
        0xFF7F8000,
        0x7F7F7FFF,
        0x00000001,
        0x00007FFF,
        0x00008000,
        0x00008001,
        0x00018000,
        0x007FFFFF,
        0x80000000,
        0x00000000,
    ]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (4096 - len(bits),), generator=generator)
    return torch.cat([torch.tensor(bits), random]).to(torch.int32).view(torch.float32)


def _to_bf16() -> float:
    import samples
    import torch

    x = _corner_cases()
    out = torch.empty(4096, dtype=torch.bfloat16)
    samples.bf16_round_trip[(1,)](x, out, BLOCK=4096)
    return _difference(out, x.bfloat16())


def _from_bf16() -> float:
    import samples
    import torch

    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(65536)
    samples.bf16_round_trip[(1,)](x, out, BLOCK=65536)
    return _difference(out, x.float())


def _other_types_and_bf16() -> float:
    import samples
    import torch

    worst = 0.0
    for dtype in (torch.int32, torch.int64, torch.float16, torch.float64):
        x = torch.arange(-512, 512).to(dtype) * 37
        out, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024, dtype=dtype)
        samples.bf16_round_trip[(1,)](x, out, BLOCK=1024)
        samples.bf16_round_trip[(1,)](out, back, BLOCK=1024)
        worst = max(
            worst,
            _difference(out, x.bfloat16()),
            (back.double() - x.bfloat16().to(dtype).double()).abs().max().item(),
        )
    return worst


def _truncate() -> float:
    """fp_downcast_rounding="rtz" cuts off; on NaNs it must not."""
    import samples
    import torch

    x = _corner_cases()
    out = torch.empty(4096, dtype=torch.bfloat16)
    samples.bf16_truncate[(1,)](x, out, BLOCK=4096)
    cut = (x.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    return _difference(out, torch.where(x.isnan(), x, cut.float()).bfloat16())


def _arithmetic() -> float:
    import samples
    import torch

    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    samples.bf16_arithmetic[(1,)](x, y, out, BLOCK=1024)
    value = x * y + x
    return _difference(out, torch.where(x > y, -value, torch.maximum(value, y.abs())))


def _constant() -> float:
    """A constant takes the tensor's type, as in compiled code."""
    import samples
    import torch

    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    samples.bf16_constant[(1,)](x, out, BLOCK=1024)
    return _difference(out, x * torch.tensor(0.3, dtype=torch.bfloat16))


def _matmul() -> float:
    import samples
    import torch

    m, n, k = 70, 40, 48
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, size, generator=generator).bfloat16() for size in ((m, k), (k, n)))
    c = torch.empty(m, n, dtype=torch.bfloat16)
    samples.matmul[(2, 1)](a, b, c, m, n, k, k, n, n, BM=64, BN=64, BK=32)
    return _difference(c, a @ b)


def _maximum_with_nan() -> float:
    """maxNum of IEEE 754-2008, which tl.maximum's default is on a GPU."""
    import samples
    import torch

    nan = torch.nan
    x, y, out = torch.tensor([1, nan, nan, -2.0]), torch.tensor([nan, 3, nan, -1.0]), torch.empty(4)
    samples.largest[(1,)](x, y, out, BLOCK=4)
    return _difference(out, torch.fmax(x, y))


def _quotient(divisor=3):
    import samples
    import torch

    x, out = torch.arange(8), torch.empty(8, dtype=torch.int64)
    samples.quotient[(1,)](x, torch.full((8,), divisor), out, BLOCK=8)
    return _difference(out, x // divisor + x % divisor)


@pytest.mark.parametrize("check", [_to_bf16, _truncate, _arithmetic, _matmul, _maximum_with_nan])
def test_right_only_when_patched(run, run_stock, check):
    assert run(check) == 0
    assert run_stock(check) > 0


@pytest.mark.parametrize("check", [_from_bf16, _other_types_and_bf16, _constant, _quotient])
def test_right(run, check):
    assert run(check) == 0


def _sum():
    import samples
    import torch

    out = torch.zeros(1, dtype=torch.bfloat16)
    samples.bf16_sum[(1,)](torch.ones(64, dtype=torch.bfloat16), out, BLOCK=64)
    return out.item()


def _atomic():
    import samples
    import torch

    out = torch.zeros(64, dtype=torch.bfloat16)
    samples.bf16_atomic[(1,)](torch.ones(64, dtype=torch.bfloat16), out, BLOCK=64)


def _quotient_by_zero():
    return _quotient(0)


@pytest.mark.parametrize(
    ("check", "why"),
    [
        (_sum, "convert to float32 first"),
        (_atomic, "an atomic on bfloat16"),
        (_quotient_by_zero, "an integer over zero"),
    ],
)
def test_refused(run, check, why):
    with pytest.raises(Exception, match=why):
        run(check)


def test_stock_sum_is_wrong(run_stock):
    assert run_stock(_sum) != 64


def _load_outside():
    import samples
    import torch

    samples.load_unmasked[(2,)](torch.zeros(100), torch.zeros(128), BLOCK=64)


def _store_outside():
    import samples
    import torch

    samples.load_unmasked[(2,)](torch.zeros(128), torch.zeros(100), BLOCK=64)


def _load_between_rows():
    """Rows of 48 in a buffer of rows of 64: what follows a row belongs to no argument, though it is
    allocated.
    """
    import samples
    import torch

    samples.copy_rows[(4,)](torch.zeros(8, 64)[:, :48], torch.zeros(4, 64), 64, COLUMNS=64)


def _load_of_empty():
    import samples
    import torch

    samples.load_unmasked[(1,)](torch.zeros(0), torch.zeros(64), BLOCK=64)


def _misaligned_address():
    import samples
    import torch

    buffer = torch.zeros(64)
    from interpreter import visible

    with visible(buffer=buffer):
        samples.store_at_address[(1,)](buffer.data_ptr() + 2, torch.zeros(32), BLOCK=32)


def _unknown_address():
    import samples
    import torch

    buffer = torch.zeros(64)
    samples.store_at_address[(1,)](buffer.data_ptr(), torch.ones(64), BLOCK=64)


@pytest.mark.parametrize(
    ("check", "why"),
    [
        (
            _load_outside,
            r"load_unmasked, program \(1, 0, 0\): load of 28 element.*"
            r"400 bytes from the start of 'x' \(100,",
        ),
        (_store_outside, r"store of 28 element.*400 bytes from the start of 'y' \(100,"),
        (
            _load_between_rows,
            r"copy_rows, program \(0, 0, 0\): load of 16 element.*"
            r"192 bytes from the start of 'x' \(8x48, strides \(64, 1\)",
        ),
        (_load_of_empty, "load of 64 element"),
        (_misaligned_address, "store of 32 element"),
        (_unknown_address, r"store of 64 element\(s\) outside every tensor"),
    ],
)
def test_out_of_bounds(run, check, why):
    with pytest.raises(Exception, match=why):
        run(check)


def _inside() -> bool:
    """Correct kernels pass: masked lanes outside, a transposed and a strided view, an address of a
    visible tensor.
    """
    import samples
    import torch
    from interpreter import visible

    x, y = torch.randn(1000), torch.empty(1000)
    samples.scale[(1,)](x, y, 1000, BLOCK=1024)
    right = torch.equal(y, x * 3)
    rows, out = torch.randn(8, 64)[:, :32], torch.empty(8, 32)
    samples.copy_rows[(8,)](rows, out, 64, COLUMNS=32)
    right &= torch.equal(out, rows)
    buffer, source = torch.zeros(64), torch.randn(64)
    with visible(peer=buffer):
        samples.store_at_address[(1,)](buffer.data_ptr(), source, BLOCK=64)
    return right and torch.equal(buffer, source)


def test_inside(run):
    assert run(_inside)


def _counts() -> dict[str, tuple[int, ...]]:
    import samples
    import torch
    from interpreter import visible
    from traffic import count_traffic

    x, y, total = (
        torch.randn(3000, dtype=torch.bfloat16),
        torch.empty(3000, dtype=torch.bfloat16),
        torch.zeros(1, dtype=torch.int32),
    )
    buffer, in_place, rows = torch.zeros(64), torch.randn(1000), torch.randn(8, 64)
    with visible(peer=buffer), count_traffic() as counter:
        samples.scale[(3,)](x, y, 3000, BLOCK=1024)
        samples.scale_twice[(3, 2)](x, y, 3000, BLOCK=1024)
        samples.count_positive[(2,)](x, total, BLOCK=1024)
        samples.store_at_address[(1,)](buffer.data_ptr(), torch.ones(64), BLOCK=64)
        samples.scale[(1,)](in_place, in_place, 1000, BLOCK=1024)
        samples.copy_rows[(4,)](rows[4:, 32:], torch.empty(4, 32), 64, COLUMNS=32)
    samples.scale[(3,)](x, y, 3000, BLOCK=1024)  # not counted
    tensors = dict(x=x, y=y, total=total, peer=buffer, in_place=in_place, rows=rows)
    counts = {name: counter.of(tensor) for name, tensor in tensors.items()}
    return {
        name: (c.read, c.distinct_read, c.written, c.distinct_written) for name, c in counts.items()
    }


def test_counts(run):
    """scale reads x once, scale_twice twice, count_positive the first 2048 elements; an atomic
    reads and writes; slices count as read.
    """
    assert run(_counts) == {
        "x": (6000 + 12000 + 4096, 6000, 0, 0),
        "y": (0, 0, 12000, 6000),
        "total": (8, 4, 8, 4),
        "peer": (0, 0, 256, 256),
        "in_place": (4000, 4000, 4000, 4000),
        "rows": (512, 512, 0, 0),
    }
