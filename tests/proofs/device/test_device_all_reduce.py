"""The CUDA all-reduce kernels, compiled for the CPU, on 2 to 8 simulated GPUs (simt/), against
plain torch.
"""

import itertools

import pytest
import torch
from ranks import DTYPES, KERNELS, Launch, Ranks, buffer_bytes, grid_size, slot_bytes

from tpkernels import _C

WORLDS = (2, 3, 4, 8)
SHAPES = ((1, 1), (1, 7), (3, 5), (1, 1031), (5, 64), (7, 136), (4, 129))
SLOT_BYTES = 1 << 14
every_world = pytest.mark.parametrize("world", WORLDS)
every_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def reference_of(launch: Launch, dtype: torch.dtype):
    """Plain torch in that dtype: the partials added in rank order, then what follows."""
    inputs, bias, residual, weight = (
        t if t is None else t.to(dtype)
        for t in (launch.inputs, launch.bias, launch.residual, launch.weight)
    )
    h = inputs[0]
    for part in inputs[1:]:
        h = h + part
    for term in (bias, residual):
        h = h if term is None else h + term
    if weight is None:
        return h, None
    return h, h * torch.rsqrt(h.square().mean(-1, keepdim=True) + launch.epsilon) * weight


def same_bits_on_all_ranks(result):
    return all(torch.equal(part.view(torch.uint8), result[0].view(torch.uint8)) for part in result)


def assert_close(out, ref, same_dtype, what):
    error, allowed = (
        (out.double() - ref).abs().max(),
        2 * (same_dtype.double() - ref).abs().max() + 1e-6,
    )
    assert error < allowed, f"{what}: {error:.3e} against {allowed:.3e}"


def check(launch: Launch, result, exact: bool):
    out, normed = result
    assert same_bits_on_all_ranks(out)
    ref, ref_normed = reference_of(launch, torch.float64)
    same, same_normed = reference_of(launch, launch.inputs.dtype)
    if exact:
        assert torch.equal(out[0].double(), ref)
    else:
        assert_close(out[0], ref, same, "sum")
    if normed is not None:
        assert same_bits_on_all_ranks(normed)
        assert_close(normed[0], ref_normed, same_normed, "norm")


def make(kernel, world, shape, dtype, rng, integers, terms="", **options):
    """terms: b(ias), r(esidual), n(orm).

    Integers: small enough that every sum is exact in every dtype.
    """

    def data(*size):
        values = (
            torch.randint(-3, 4, size, generator=rng)
            if integers
            else torch.randn(size, generator=rng)
        )
        return values.to(dtype)

    rows, columns = shape
    return Launch(
        kernel,
        data(world, rows, columns),
        data(columns) if "b" in terms else None,
        data(rows, columns) if "r" in terms else None,
        data(columns) if "n" in terms else None,
        **options,
    )


@every_world
@every_dtype
@pytest.mark.parametrize("integers", (True, False), ids=("integers", "floats"))
def test_every_kernel_shape_and_epilogue(world, dtype, integers):
    rng = torch.Generator().manual_seed(world)
    # The rule for floats compares maxima, which says little of a few elements.
    shapes = [shape for shape in SHAPES if integers or shape[0] * shape[1] > 300]
    cases = list(itertools.product(KERNELS, shapes, ("", "b", "r", "br", "n", "brn")))
    # Every shape with every kernel and with every epilogue; all of the product would say the same
    # again.
    cases = [case for i, case in enumerate(cases) if (i + i // 6) % 3 == world % 3]
    launches = [
        make(
            kernel,
            world,
            shape,
            dtype,
            rng,
            integers,
            terms,
            blocks=1 + i % 3,
            in_place=i % 2 == 0,
            offset=i % 5 // 4,
        )
        for i, (kernel, shape, terms) in enumerate(cases)
    ]
    with Ranks(world, SLOT_BYTES) as ranks:
        results, _ = ranks.run(launches, seed=world)
    for launch, result in zip(launches, results, strict=True):
        check(launch, result, integers)


@every_world
def test_changed_data_under_identical_arguments(world):
    """A captured CUDA graph replays a launch like this: the epoch is the device's own affair."""
    rng = torch.Generator().manual_seed(1)
    for kernel, seed in itertools.product(KERNELS, range(4)):
        launches = [
            make(kernel, world, (3, 72), torch.bfloat16, rng, True, "brn") for _ in range(4)
        ]
        with Ranks(world, SLOT_BYTES) as ranks:
            results, _ = ranks.run(launches, seed)
        for launch, result in zip(launches, results, strict=True):
            check(launch, result, True)


def mixed(world, rng, count):
    def draw(*values):
        return values[torch.randint(len(values), (), generator=rng)]

    return [
        make(
            draw(*KERNELS),
            world,
            draw(*SHAPES),
            draw(*DTYPES),
            rng,
            True,
            draw("", "b", "r", "n", "brn"),
            blocks=draw(1, 2, 3, 5),
            threads=draw(64, 96),
            in_place=draw(True, False),
        )
        for _ in range(count)
    ]


@every_world
@pytest.mark.parametrize(
    "epoch", (0, 2**32 - 8, 2**31 - 6), ids=("from zero", "across 32 bits", "across 31 bits")
)
def test_any_sequence_of_kernels_sizes_and_grids(world, epoch):
    rng = torch.Generator().manual_seed(world + epoch)
    for seed in range(4):
        launches = mixed(world, rng, 10)
        with Ranks(world, SLOT_BYTES, epoch) as ranks:
            for part in (launches[:7], launches[7:]):
                results, _ = ranks.run(part, seed)
                for launch, result in zip(part, results, strict=True):
                    check(launch, result, True)


@pytest.mark.parametrize("world", (2, 8))
def test_the_largest_grid_between_smaller_ones(world):
    """Every flag is used: those of the last block of the last rank too."""
    rng = torch.Generator().manual_seed(world)
    blocks = grid_size(10_000, 8192, torch.float32, False)
    shape, dtype = (blocks, 8), torch.float32
    launches = [
        make(kernel, world, shape, dtype, rng, True, terms, blocks=grid)
        for kernel, grid, terms in zip(
            (*KERNELS, *KERNELS),
            (blocks, 5, blocks, blocks, 1, blocks),
            ("", "brn", "r", "n", "b", "brn"),
            strict=True,
        )
    ]
    with Ranks(world, slot_bytes(*shape, dtype)) as ranks:
        results, _ = ranks.run(launches, seed=world)
    for launch, result in zip(launches, results, strict=True):
        check(launch, result, True)


def test_the_seed_changes_the_order_and_nothing_else():
    def run(seed):
        launches = mixed(3, torch.Generator().manual_seed(0), 4)
        with Ranks(3, SLOT_BYTES) as ranks:
            return ranks.run(launches, seed)

    runs = [run(seed) for seed in range(8)]
    assert len({trace for _, trace in runs}) == 8
    assert run(3)[1] == runs[3][1]
    for results, _ in runs:
        for (out, _), (expected, _) in zip(results, runs[0][0], strict=True):
            assert torch.equal(out, expected)


def test_rounds_once():
    """0.5 + 256 is not a bfloat16; with the residual it is one again.

    Only a sum in fp32, rounded at the end, is right.
    """
    for kernel in ("one_shot", "two_shot"):
        inputs = (
            torch.tensor([256.0, 0.5, 0.25])
            .to(torch.bfloat16)
            .view(3, 1, 1)
            .expand(3, 1, 40)
            .contiguous()
        )
        residual = torch.full((1, 40), -256.0, dtype=torch.bfloat16)
        with Ranks(3, SLOT_BYTES) as ranks:
            ((out, _),), _ = ranks.run([Launch(kernel, inputs, residual=residual)])
        assert (out == 0.75).all()


def test_the_order_of_the_sum_is_the_ranks_order():
    values = (
        torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).view(4, 1, 1).expand(4, 2, 33).contiguous()
    )
    for kernel in ("one_shot", "two_shot"):
        with Ranks(4, SLOT_BYTES) as ranks:
            ((out, _),), _ = ranks.run([Launch(kernel, values)])
        assert (out == 0).all()


@pytest.mark.parametrize("norm", (False, True), ids=("sum", "norm"))
def test_the_launch_that_the_helpers_ask_for(norm):
    rng = torch.Generator().manual_seed(2)
    shape, dtype = (3, 4104), torch.bfloat16
    options = dict(blocks=grid_size(*shape, dtype, norm), threads=512)
    assert options["blocks"] == (3 if norm else 4)
    launches = [
        make(kernel, 2, shape, dtype, rng, True, "brn" if norm else "br", **options)
        for kernel in KERNELS
    ]
    with Ranks(2, slot_bytes(*shape, dtype)) as ranks:
        results, _ = ranks.run(launches)
    for launch, result in zip(launches, results, strict=True):
        check(launch, result, True)


def test_host_helpers():
    bf16, f32 = torch.bfloat16, torch.float32
    assert (
        grid_size(0, 8, bf16, False)
        == grid_size(0, 8, bf16, True)
        == grid_size(8, 0, bf16, True)
        == grid_size(8, 0, bf16, False)
        == 0
    )
    assert grid_size(1, 1, bf16, False) == grid_size(1, 4096, bf16, False) == 1
    assert grid_size(1, 4097, bf16, False) == 2
    assert grid_size(5, 64, bf16, True) == 5
    assert grid_size(10_000, 8192, f32, True) == grid_size(10_000, 8192, f32, False) == 36
    assert slot_bytes(3, 5, bf16) == 3 * 16 and slot_bytes(2, 9, f32) == 2 * 48


@pytest.mark.parametrize("slot", (16, 4096, 8 << 20))
def test_the_engine_asks_for_the_bytes_that_the_device_code_lays_out(slot):
    flags = 8 * 8 * grid_size(10_000, 8192, torch.float32, False)  # of 8 ranks, 8 bytes each
    assert flags + 2 * slot <= buffer_bytes(slot) < flags + 2 * slot + 128
    assert buffer_bytes(slot) == _C.peer_buffer_bytes(slot)
