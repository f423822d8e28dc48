"""tpk.tune and the calibrations that init_mesh loads."""

import os
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels as tpk
from tpkernels.group import resolve_group
from tpkernels.overlap import calibration_cache
from tpkernels.overlap.calibration_cache import Calibration, calibration_of
from tpkernels.overlap.cost_model import GemmShape


def saved(folder, spoiled):
    os.environ["XDG_CACHE_HOME"] = folder
    rank, told = dist.get_rank(), []
    mesh = tpk.init_mesh(dist.get_world_size(), device="cpu")
    group = resolve_group(mesh["tp"])
    assert calibration_of(group) is None
    if spoiled is None:
        with mock.patch.multiple(
            "tpkernels.overlap.calibrate",
            GEMM_ROWS={"cpu": (16, 64)},
            ALL_REDUCE_BYTES=(64, 256),
            GEMM_SIZE={"cpu": 32},
            PROBE_BYTES=4096,
        ):
            table = tpk.tune(group, [(256, 8, 8)], [torch.float32])
    elif rank == 0:
        path = calibration_cache.CalibrationKey.of(group).path
        path.parent.mkdir(parents=True)
        path.write_text(spoiled)
    else:
        calibration_cache.CalibrationKey.of(group)
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = calibration_of(
            resolve_group(tpk.init_mesh(dist.get_world_size(), device="cpu")["tp"])
        )
    warned = [w for w in caught if "tpkernels tune" in str(w.message)]
    told = [str(w.message) for w in warned]
    assert all(w.filename == __file__ for w in warned)  # whose line it shows
    if spoiled is not None:
        return again, told, os.listdir(f"{folder}/tpkernels")
    assert again == table and calibration_of(group) is table and not told
    assert set(table.timings[torch.float32].measured) == {
        GemmShape(256, 8, 8, False),
        GemmShape(256, 8, 8, True),
    }
    assert all(list(times) == [1, 2] for times in table.timings[torch.float32].measured.values())
    return table, told, os.listdir(f"{folder}/tpkernels")


def test_tuned_saved_and_handed_out_by_init_mesh(pool, tmp_path):
    (first, _, files), *others = pool.run(2, saved, str(tmp_path), None)
    assert all(table == first for table, *_ in others)
    (name,) = files  # and nothing half-written beside it
    assert name.startswith("calibration-") and "shm-on-1-host-2-ranks" in name
    assert Calibration.from_json((tmp_path / "tpkernels" / name).read_text()) == first


@pytest.mark.parametrize(
    "spoiled",
    [
        "",
        "{",
        "[]",
        '{"measured_on": "", "date": ""}',
        '{"measured_on": "", "date": "", "dtypes": {"load": {}}}',
    ],
)
def test_a_table_that_cannot_be_read_is_a_warning(pool, tmp_path, spoiled):
    for rank, (table, told, _) in enumerate(pool.run(2, saved, str(tmp_path), spoiled)):
        assert (
            table is None
            and len(told) == (rank == 0)
            and all("cannot be read" in text for text in told)
        )


def other_hosts():
    told = []
    with (
        mock.patch.object(
            calibration_cache.socket, "gethostname", lambda: f"host {dist.get_rank()}"
        ),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        tpk.init_mesh(2, device="cpu")
        told = [str(w.message) for w in caught]
        assert all(w.filename == __file__ for w in caught if "hosts" in str(w.message))
    return told


def test_an_unmeasured_link_between_hosts_is_said_once(pool):
    first, second = pool.run(2, other_hosts)
    assert sum("2 hosts" in text and "tpk.tune(group)" in text for text in first) == 1 and not any(
        "hosts" in text for text in second
    )


@run_on_ranks(2)
def test_bad_shapes_are_refused_before_anything_is_measured():
    for shapes in ([(1, 2)], [(1, 2, 0)], [(1, 2.0, 3)], [5]):
        with pytest.raises(ValueError, match=r"shapes must be .*ints of at least 1"):
            tpk.tune(dist.group.WORLD, shapes)


@run_on_ranks(3)
def test_the_first_rank_names_the_link():
    """Ranks of other interfaces share its file; how many hosts there are counts them all."""
    rank = dist.get_rank()
    group, here = resolve_group(dist.group.WORLD), ("a", "b", "b")[rank]
    with (
        mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME=f"eth{rank}"),
        mock.patch.object(calibration_cache.socket, "gethostname", lambda: here),
        mock.patch.object(calibration_cache, "_device_name", lambda kind: f"{kind} {rank}"),
    ):
        key = calibration_cache.CalibrationKey.of(group)
    assert key == calibration_cache.CalibrationKey("cpu 0", "gloo over eth0 on 2 hosts", 3, 2)
