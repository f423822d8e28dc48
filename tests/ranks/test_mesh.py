"""Meshes and groups: the communicator that a schedule runs on."""

import copy
import os
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels as tpk
from tpkernels import group as groups
from tpkernels.group import Group, resolve_group


@run_on_ranks(4)
def test_a_mesh_of_four():
    mesh = tpk.init_mesh(tp=2, dp=2, device="cpu", timeout=timedelta(seconds=30))
    assert mesh.mesh_dim_names == ("dp", "tp") and mesh.mesh.tolist() == [
        [0, 1],
        [2, 3],
    ]  # tp innermost
    group = resolve_group(None)
    assert group.size == 2 and group.rank == dist.get_rank() % 2
    ones = torch.ones(3)
    assert tpk.all_reduce_(ones, None) is ones and ones.tolist() == [2, 2, 2]
    assert (
        tpk.all_reduce_(torch.tensor([dist.get_rank()]), mesh["dp"]).item()
        == {0: 2, 1: 4}[dist.get_rank() % 2]
    )
    with pytest.raises(ValueError, match=r"dimensions \('dp', 'tp'\)"):
        resolve_group(mesh)
    assert copy.deepcopy(group) is group
    with pytest.raises(TypeError, match="unsharded_state_dict"):
        pickle.dumps(group)
    before = dist.group.WORLD
    other = tpk.init_mesh(tp=4, device="cpu")
    # The default group is left as it is; the mesh has groups of its own.
    assert dist.group.WORLD is before and other["tp"].get_group() is not before
    with pytest.raises(ValueError, match="ambiguous"):
        resolve_group(None)


@run_on_ranks(1)
def test_one_process_needs_no_torchrun():
    dist.destroy_process_group()
    del os.environ["RANK"]
    mesh = tpk.init_mesh(1, device="cpu")
    assert mesh["tp"].size() == 1


@run_on_ranks(2)
def test_chunked_schedules_use_the_second_communicator():
    plain, chunked = dist.new_group([0, 1]), dist.new_group([0, 1])
    groups._chunked_groups[plain.group_name] = chunked
    try:
        group = Group(plain, "cuda")
        row = tpk.nn.RowParallelLinear(8, 4, group=group, overlap=3)
        column = tpk.nn.ColumnParallelLinear(4, 8, group=group, overlap=3)
    finally:
        groups._chunked_groups.clear()
    x = torch.randn(60, 4, requires_grad=True)
    with tpk.log_collectives() as log:
        row(column(x)).sum().backward()
    assert [c.group for c in log] == [chunked.group_name] * 6  # three chunks each way
    row.overlap = column.overlap = False
    with tpk.log_collectives() as log:
        row(column(x)).sum().backward()
    assert [c.group for c in log] == [plain.group_name] * 2
    assert "high stream priority" not in row.explain(4096)
    passed = tpk.nn.RowParallelLinear(8, 4, group=Group(plain, "cuda"))
    # A group that the user made is used as it is, and explain() says so.
    assert "high stream priority" in passed.explain(4096)
    assert "2 chunks of 2048, 2048 rows" in passed.explain(
        4096
    ) and "1 chunk of 100 rows" in passed.explain(100)
    assert "not measured" in passed.explain(4096)
