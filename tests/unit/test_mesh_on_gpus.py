"""init_mesh on GPUs, recorded: the groups and devices that it asks torch for."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels import group as groups
from tpkernels import mesh as mesh_module
from tpkernels.kernels import tuning
from tpkernels.overlap import calibration_cache


def test_a_process_without_torchrun_takes_the_first_gpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(mesh_module, "_start_default_group", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it goes no further
        tpk.init_mesh(tp=1, device="cuda")
    assert devices == [0]


def test_init_mesh_on_gpus(monkeypatch):
    """It asks for LOCAL_RANK's device, both backends, and a group of high priority and few CTAs."""
    seen = []

    class Options:
        def __init__(self, is_high_priority_stream):
            self.is_high_priority_stream = is_high_priority_stream
            self.config = SimpleNamespace(max_ctas=None)

    def new_groups(ranks, timeout, backend, options):
        seen.append((ranks, backend, options))
        return SimpleNamespace(group_name=f"group{len(seen)}"), None

    for name, value in (("LOCAL_RANK", "3"), ("WORLD_SIZE", "4"), ("RANK", "3")):
        monkeypatch.setenv(name, value)
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
    monkeypatch.setattr(groups, "default_group", lambda: torch)  # any object that lives on
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
    assert tp == again == [[0, 1], [2, 3]] and dp == [[0, 2], [1, 3]]
    assert plain == backend == "cpu:gloo,cuda:nccl"
    assert no_options is None and options.is_high_priority_stream
    assert 0 < options.config.max_ctas <= 32
    assert groups._chunked_groups["group1"].group_name == "group3"
    assert opened == [("group1", torch.device("cuda", 3))]
    assert loaded == ["group1", ("group1", "cuda")]
