"""Which transport a group takes: gloo or shared memory, and the reason."""

import warnings

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels import group as groups
from tpkernels import transport


def two_hosts(*rows):
    return [None, "ranks 0 to 2 are on 2 hosts"]


def transports():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = {}
        for forced in (None, "gloo", "shm"):
            if forced:
                patch.setenv("TPKERNELS_TRANSPORT", forced)
            mesh = tpk.init_mesh(2, 2, device="cpu")
            layer = tpk.nn.RowParallelLinear(8, 8, group=mesh["tp"])
            seen[forced] = [dist.get_backend(mesh[d].get_group()) for d in ("tp", "dp")] + [
                layer.group.transport
            ]
            assert layer.group.transport in layer.explain(10)
        patch.setenv("TPKERNELS_TRANSPORT", "rdma")
        with pytest.raises(ValueError, match="TPKERNELS_TRANSPORT=rdma"):
            tpk.init_mesh(2, 2, device="cpu")
        patch.setenv("TPKERNELS_TRANSPORT", "shm")
        patch.setattr(transport, "shm_unavailable_reasons", two_hosts)
        with pytest.raises(
            RuntimeError, match="TPKERNELS_TRANSPORT=shm, but ranks 0 to 2 are on 2 hosts"
        ):
            tpk.init_mesh(2, 2, device="cpu")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(transport, "shm_unavailable_reasons", two_hosts)
        mesh = tpk.init_mesh(2, 2, device="cpu")
        seen["hosts"] = [dist.get_backend(mesh[d].get_group()) for d in ("tp", "dp")]
        patch.setenv("TPKERNELS_TRANSPORT", "gloo")
        group = dist.new_group([0, 1, 2, 3], backend="shm")
        x = torch.ones(3)
        dist.all_reduce(x, group=group)
        assert x.tolist() == [4] * 3
        assert groups.resolve_group(group).transport == "gloo"
        seen["said"] = [str(w.message) for w in caught]
    # a group that was passed keeps its transport, and it is said
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="a group that was passed keeps its own transport, gloo"),
    ):
        patch.setenv("TPKERNELS_TRANSPORT", "shm")
        assert tpk.nn.RowParallelLinear(8, 8, group=dist.group.WORLD).group.transport == "gloo"
    return seen


def test_which_transport_a_mesh_takes(pool):
    results = pool.run(4, transports)
    for seen in results:
        assert seen[None] == seen["shm"] == ["shm"] * 3 and seen["gloo"] == ["gloo"] * 3
        assert seen["hosts"] == ["shm", "gloo"]
    said = results[0]["said"]
    assert any(
        "groups of 2 ranks run on gloo, not on shared memory: ranks 0 to 2 are on 2 hosts" in s
        for s in said
    )
    assert (
        any("a group that was asked for with shm runs on gloo" in s for s in said)
        and not results[1]["said"]
    )


def hosts():
    if dist.get_rank() == 1:
        tpk.transport._C = type(
            "Elsewhere",
            (),
            {
                "shm_host": staticmethod(lambda: "elsewhere"),
                "shm_free_bytes": staticmethod(lambda: 1 << 40),
            },
        )
    try:
        return tpk.transport.shm_unavailable_reasons(torch.arange(2).view(1, 2))
    finally:
        tpk.transport._C = tpk._C


def test_ranks_of_two_hosts(pool):
    first, second = pool.run(2, hosts)
    assert first == second and "ranks 0 to 1 are on 2 hosts" in first[0]
