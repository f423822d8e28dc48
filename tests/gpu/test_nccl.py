"""The engine over NCCL: its second communicator, CUDA graphs. Not run yet on any machine."""

import pytest
import torch
import torch.distributed as dist
from linear_cases import check_linears_exactly
from pool import Pool

import tpkernels as tpk
from tpkernels.group import resolve_group

pytestmark = pytest.mark.gpu
RANKS = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]


@pytest.fixture(scope="module")
def gpu_pool():
    with Pool(backend="cpu:gloo,cuda:nccl") as pool:
        yield pool


@pytest.mark.parametrize("ranks", RANKS or [1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_equal_nn_linear_exactly(gpu_pool, ranks, dtype):
    for chunks in (1, 2, 3, 7):
        for rows, k, n in ((50, 13, 11), (300, 64, 96), (0, 8, 8)):
            gpu_pool.run(ranks, check_linears_exactly, chunks, rows, k, n, dtype, "cuda")


def chunks_use_the_second_communicator():
    mesh = tpk.init_mesh(dist.get_world_size(), device="cuda")
    group = resolve_group(mesh["tp"])
    assert group.has_chunked_group == (group.size > 1)
    layer = tpk.nn.RowParallelLinear(256, 256, group=mesh["tp"], overlap=4, device="cuda")
    x = torch.randn(1024, layer.in_spec.shard_sizes[group.rank], device="cuda")
    with tpk.log_collectives() as log:
        whole = layer(x)
        layer.overlap = False
        assert (layer(x) - whole).abs().max() < 1e-3
    assert {c.group for c in log} == ({group.name, group.chunked_name} if group.size > 1 else set())


@pytest.mark.parametrize("ranks", RANKS or [1])
def test_chunks_use_the_second_communicator(gpu_pool, ranks):
    gpu_pool.run(ranks, chunks_use_the_second_communicator)


def captured(chunks):
    mesh = tpk.init_mesh(dist.get_world_size(), device="cuda")
    layer = tpk.nn.RowParallelLinear(256, 128, group=mesh["tp"], overlap=chunks, device="cuda")
    x = torch.randn(512, layer.in_spec.shard_sizes[dist.get_rank()], device="cuda")
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):  # the same graph, other data
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("ranks", RANKS or [1])
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_cuda_graph_captures_the_layer(gpu_pool, ranks, chunks):
    gpu_pool.run(ranks, captured, chunks)
