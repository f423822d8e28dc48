"""Two ranks for pytest-benchmark: the measuring process is rank 0, one spawned process is rank 1 and makes the same calls."""

import multiprocessing as mp
import os
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(__file__))
ROUNDS, WARMUP = 30, 5


def join(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)


def _peer(pipe, store: str) -> None:
    join(1, store)
    while (job := pipe.recv()) is not None:
        make, args = job
        call = make(*args)
        for _ in range(WARMUP + ROUNDS):
            call()


@pytest.fixture(scope="session")
def peer():
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        context = mp.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_peer, args=(there, store), daemon=True)
        process.start()
        join(0, store)
        yield here
        here.send(None)
        process.join(10)
        process.kill()
        dist.destroy_process_group()


@pytest.fixture
def both_ranks(benchmark, peer):
    """both_ranks(make, *args): times make(*args)() on both ranks; every call communicates, which keeps them in step."""

    def run(make, *args):
        peer.send((make, args))
        benchmark.pedantic(make(*args), rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)

    return run
