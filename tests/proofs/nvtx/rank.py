"""A rank whose ranges recorder.c records: `rank.py RANK SIZE STORE`.

Each case runs inside a Python range of its own.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels.profiling import range as profile_range

sys.path.append(str(Path(__file__).parents[2] / "support"))
from unchecked import Unchecked

ROWS = 48
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
group = dist.group.WORLD
x, shard = torch.randn(ROWS, 8), torch.randn(ROWS, 8 // size)

with profile_range("row, one chunk"), torch.no_grad():
    tpk.nn.RowParallelLinear(8, 6, group=group)(shard)
with profile_range("row, three chunks, residual"), torch.no_grad():
    tpk.nn.RowParallelLinear(8, 6, group=group, overlap=3)(shard, residual=torch.randn(ROWS, 6))
y = tpk.nn.ColumnParallelLinear(8, 6, group=group, overlap=2)(x.clone().requires_grad_())
with profile_range("column backward, two chunks"):
    y.sum().backward()
with profile_range("embedding"), torch.no_grad():
    tpk.nn.VocabParallelEmbedding(10, 4, group=group)(torch.arange(10))
with profile_range("loss"):
    tpk.functional.vocab_parallel_cross_entropy(
        torch.randn(ROWS, 5), torch.zeros(ROWS, dtype=torch.long), group=group
    )
with profile_range("gather"), torch.no_grad():
    tpk.nn.ColumnParallelLinear(8, 6, group=group, gather_output=True)(x)
ops = Unchecked(torch.ops.tpkernels)
with profile_range("an epilogue throws"):
    try:
        ops.row_linear(
            shard,
            torch.randn(6, 8 // size),
            None,
            torch.randn(ROWS - 1, 6),
            group.group_name,
            2,
            "row_forward",
        )
    except RuntimeError as error:
        assert "exceeds dimension size" in str(error)
with profile_range("a GEMM throws"):
    dys, weights = [torch.randn(ROWS, 3), torch.randn(ROWS - 1, 3)], [torch.randn(3, 8)] * 2
    try:
        ops.column_linear_backward(
            dys,
            None,
            weights,
            True,
            [False] * 2,
            [False] * 2,
            group.group_name,
            2,
            "column_backward",
        )
    except RuntimeError as error:
        assert "exceeds dimension size" in str(error)
try:
    with profile_range("Python throws"):
        raise KeyError
except KeyError:
    pass
dist.barrier()
dist.destroy_process_group()
