"""Meshes and groups: which communicator a schedule runs on, what init_mesh makes on GPUs (recorded, there are none here)."""

import copy
import os
import pickle
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels import group as groups
from tpkernels import mesh as mesh_module
from tpkernels.group import Group, resolve_group
from tpkernels.kernels import tuning
from tpkernels.overlap import calibration_cache


def mesh_of_four():
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
    assert (
        dist.group.WORLD is before and other["tp"].get_group() is not before
    )  # left as it is; the mesh has groups of its own
    with pytest.raises(ValueError, match="ambiguous"):
        resolve_group(None)


def test_a_mesh_of_four(pool):
    pool.run(4, mesh_of_four)


def one_process():
    dist.destroy_process_group()
    del os.environ["RANK"]
    mesh = tpk.init_mesh(1, device="cpu")
    assert mesh["tp"].size() == 1


def test_one_process_needs_no_torchrun(pool):
    pool.run(1, one_process)


def routing():
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
    assert "high stream priority" in passed.explain(
        4096
    )  # a group that the user made: used as it is, and said
    assert "2 chunks of 2048, 2048 rows" in passed.explain(
        4096
    ) and "1 chunk of 100 rows" in passed.explain(100)
    assert "not measured" in passed.explain(4096)


def test_chunked_schedules_use_the_second_communicator(pool):
    pool.run(2, routing)


def test_init_mesh_on_gpus(monkeypatch):
    """What it asks torch for: LOCAL_RANK's device, both backends, a second group of high priority and few CTAs."""
    seen = []

    class Options:
        def __init__(self, is_high_priority_stream):
            self.is_high_priority_stream, self.config = (
                is_high_priority_stream,
                SimpleNamespace(max_ctas=None),
            )

    def new_groups(ranks, timeout, backend, options):
        seen.append((ranks, backend, options))
        return SimpleNamespace(group_name=f"group{len(seen)}"), None

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    devices, started, mesh = [], [], SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: started.append(backend)
    )
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_groups)
    monkeypatch.setattr(mesh_module.DeviceMesh, "from_group", lambda pgs, *args, **names: mesh)
    monkeypatch.setattr(groups, "_meshes", [])
    monkeypatch.setattr(groups, "_chunked_groups", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    opened, loaded = [], []
    monkeypatch.setattr(
        mesh_module, "open_peer_memory", lambda pg, device: opened.append((pg.group_name, device))
    )
    monkeypatch.setattr(tuning, "load", lambda pg: loaded.append(pg.group_name))
    monkeypatch.setattr(mesh_module, "Group", lambda pg, device: (pg.group_name, device))
    monkeypatch.setattr(calibration_cache, "load", loaded.append)
    assert tpk.init_mesh(tp=2, dp=2, device="cuda") is mesh
    assert devices == [3] and started == ["cpu:gloo,cuda:nccl"]
    (tp, plain, no_options), (dp, _, _), (again, backend, options) = seen
    assert (
        tp == again == [[0, 1], [2, 3]]
        and dp == [[0, 2], [1, 3]]
        and plain == backend == "cpu:gloo,cuda:nccl"
    )
    assert (
        no_options is None and options.is_high_priority_stream and 0 < options.config.max_ctas <= 32
    )
    assert groups._chunked_groups["group1"].group_name == "group3"
    assert opened == [("group1", torch.device("cuda", 3))] and loaded == [
        "group1",
        ("group1", "cuda"),
    ]
