"""TPKERNELS_DEBUG names the ranks whose collectives differ."""

import os

import pytest
import torch
import torch.distributed as dist

import tpkernels.functional as tpf


def disagreement(kind):
    """Each rank's message; without the check these hang, or return wrong numbers."""
    rank = dist.get_rank()
    x, w = torch.zeros(256, 4), torch.zeros(3, 4)
    os.environ["TPKERNELS_DEBUG"] = "1"
    try:
        tpf.row_parallel_linear(x, w, group=dist.group.WORLD, overlap=2)  # agreed
        if kind == "chunks":
            tpf.row_parallel_linear(x, w, group=dist.group.WORLD, overlap=1 + rank)
        elif kind == "rows":
            tpf.row_parallel_linear(x[rank:], w, group=dist.group.WORLD)
        elif kind == "order":
            order = [tpf.row_parallel_linear, tpf.column_parallel_linear]
            order[rank](x, w, group=dist.group.WORLD, **({"gather_output": True} if rank else {}))
    except RuntimeError as error:
        return str(error)
    finally:
        del os.environ["TPKERNELS_DEBUG"]


@pytest.mark.parametrize(
    "kind, differing",
    [("chunks", "chunk 0 of 2"), ("rows", "[255, 3]"), ("order", "all_gather for gather_output")],
)
@pytest.mark.parametrize("transport", ["pool", "shm_pool"])
def test_debug_names_the_ranks_that_disagree(request, transport, kind, differing):
    messages = request.getfixturevalue(transport).run(2, disagreement, kind)
    for message in messages:
        assert (
            "different collectives" in message
            and "rank 0: all_reduce for row_forward" in message
            and differing in message
        )
