"""All-reduces over peer memory on real GPUs. Not run yet on any machine.

With one GPU the ranks share it. torch has to be allowed to, and the group is gloo's, since NCCL
takes one rank a device.
"""

import os

import pytest
import reference
import torch
import torch.distributed as dist
from pool import Pool

import tpkernels as tpk
from tpkernels.group import resolve_group
from tpkernels.peer_memory import open_peer_memory

pytestmark = pytest.mark.gpu
DEVICES = torch.cuda.device_count()
RANKS = [n for n in (2, 3, 4, 8) if n <= DEVICES] or [2]
ops = torch.ops.tpkernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def gpu_pool():
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with Pool(backend="cpu:gloo,cuda:nccl" if DEVICES > 1 else "gloo") as pool:
        yield pool


def opened(max_bytes, multicast=False):
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    pg, device = dist.group.WORLD, torch.device("cuda", torch.cuda.current_device())
    memory = open_peer_memory(pg, device, max_bytes, multicast)
    assert memory.max_bytes == max_bytes, memory.reason
    return pg, device


def parts_of(shape, dtype, device, seed):
    """Every rank's integers, the same lists on all ranks."""
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-8, 9, shape, generator=rng).to(dtype).to(device)
        for _ in range(dist.get_world_size())
    ]


def sums(multicast):
    pg, device = opened(1 << 20, multicast)  # 2 ranks: one-shot only; from 3 on both
    rank = dist.get_rank()
    for dtype in DTYPES:
        for seed, shape in enumerate([(1,), (7,), (33, 129), (64, 1000), (512, 512), (3, 5, 8)]):
            parts = parts_of(shape, dtype, device, seed)
            mine = parts[rank].clone()
            ops.all_reduce_(mine, pg.group_name, "sum", "test")
            torch.testing.assert_close(mine, reference.sum_in_rank_order(parts), atol=0, rtol=0)


def layers():
    pg, device = opened(1 << 20)
    rank = dist.get_rank()
    for dtype in DTYPES:
        for rows, features in ((1, 64), (17, 100), (128, 1024)):
            xs, ws = (
                parts_of((rows, 16), dtype, device, 1),
                parts_of((features, 16), dtype, device, 2),
            )
            bias, residual = (
                parts_of((features,), dtype, device, 3)[0],
                parts_of((rows, features), dtype, device, 4)[0],
            )
            weight = torch.rand(features, generator=torch.Generator().manual_seed(5)).to(
                device, dtype
            )
            for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
                want = reference.row_linear(xs, ws, b, r)
                out = ops.row_linear(xs[rank], ws[rank], b, r, pg.group_name, 1, "row_forward")
                torch.testing.assert_close(out, want)
                h, y = ops.row_linear_rms_norm(
                    xs[rank], ws[rank], b, r, weight, 1e-5, pg.group_name, 1, "row_forward"
                )
                assert torch.equal(h, out)
                torch.testing.assert_close(y, reference.norm(h, None, weight, None, 1e-5, True)[0])
                every = [torch.empty_like(y.cpu()) for _ in xs]
                dist.all_gather(every, y.cpu())
                assert all(torch.equal(e, every[0]) for e in every)  # the same bits everywhere


def captured():
    pg, device = opened(1 << 20)
    rank = dist.get_rank()
    for shape in ((8,), (64, 512), (400, 512)):
        buffer = torch.zeros(shape, device=device)
        ops.all_reduce_(buffer, pg.group_name, "sum", "test")
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.all_reduce_(buffer, pg.group_name, "sum", "test")
        for seed in range(5):  # the same arguments, other data: epochs advance in device memory
            parts = parts_of(shape, torch.float32, device, seed)
            buffer.copy_(parts[rank])
            graph.replay()
            torch.testing.assert_close(buffer, reference.sum_in_rank_order(parts), atol=0, rtol=0)
            direct = parts[rank].clone()
            ops.all_reduce_(direct, pg.group_name, "sum", "test")  # between replays
            torch.testing.assert_close(direct, buffer, atol=0, rtol=0)


def many_launches():
    """Sizes, kernels and streams in turn, as fast as they can be launched."""
    pg, device = opened(4 << 20)
    rank, streams = dist.get_rank(), [torch.cuda.current_stream(), torch.cuda.Stream()]
    parts = parts_of((1 << 20,), torch.float32, device, 0)
    total = reference.sum_in_rank_order(parts)
    found = []
    for i in range(300):
        n = (1, 100, 4096, 1 << 17, 1 << 20)[i % 5]
        stream = streams[i // 7 % 2]
        stream.wait_stream(streams[1 - i // 7 % 2])
        with torch.cuda.stream(stream):
            buffer = parts[rank][:n].clone()
            ops.all_reduce_(buffer, pg.group_name, "sum", "test")
            found.append((buffer == total[:n]).all())
    torch.cuda.synchronize()
    assert all(found)


def mesh_takes_it():
    torch.cuda.set_device(dist.get_rank())
    mesh = tpk.init_mesh(dist.get_world_size(), device="cuda")
    group = resolve_group(mesh["tp"])
    assert group.peer_memory.max_bytes > 0, group.peer_memory.reason
    layer = tpk.nn.RowParallelLinear(
        256, 256, group=mesh["tp"], device="cuda", dtype=torch.bfloat16
    )
    assert "over symm" in layer.explain(16) and "over nccl" in layer.explain(100_000)


@pytest.mark.parametrize("ranks", RANKS)
def test_sums(gpu_pool, ranks):
    gpu_pool.run(ranks, sums, False)


@pytest.mark.skipif(
    DEVICES < 2 or torch.cuda.get_device_capability() < (9, 0),
    reason="needs NVLink SHARP: several sm_90 GPUs on a switch",
)
@pytest.mark.parametrize("ranks", RANKS)
def test_sums_by_the_switch(gpu_pool, ranks):
    gpu_pool.run(ranks, sums, True)


@pytest.mark.parametrize("ranks", RANKS)
def test_layers(gpu_pool, ranks):
    gpu_pool.run(ranks, layers)


@pytest.mark.parametrize("ranks", RANKS)
def test_cuda_graphs(gpu_pool, ranks):
    gpu_pool.run(ranks, captured)


@pytest.mark.parametrize("ranks", RANKS)
def test_many_launches(gpu_pool, ranks):
    gpu_pool.run(ranks, many_launches)


@pytest.mark.skipif(DEVICES < 2, reason="needs two GPUs: NCCL takes one rank a device")
@pytest.mark.parametrize("ranks", RANKS)
def test_init_mesh_opens_it(gpu_pool, ranks):
    gpu_pool.run(ranks, mesh_takes_it)
