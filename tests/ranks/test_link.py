"""A real slow link: two ranks in network namespaces, joined at 1 Gbit/s.

After tuning, overlap="auto" takes more than one chunk, and its results are right.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import tpkernels as tpk

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from link import Link, missing

SMALL_PROBES = dict(
    GEMM_SIZE={"cpu": 1024}, GEMM_ROWS={"cpu": (128, 512, 2048)}, PROBE_BYTES=4 << 20
)


def overlapped(folder):
    """Returns the row chunks that auto takes forward, and the link's name in the calibration."""
    os.environ["XDG_CACHE_HOME"] = folder
    group = dist.group.WORLD
    torch.manual_seed(0)
    x, linear = torch.randint(-3, 4, (2048, 2048)).float(), torch.nn.Linear(2048, 512)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randint(-3, 4, p.shape))
    row = tpk.nn.RowParallelLinear.from_linear(linear, group=group, input_is_parallel=False)
    untuned = row.explain(2048)
    assert "1 chunk of 2048 rows" in untuned and "tpk.tune(group) has not been run" in untuned
    for _ in range(3):  # a measurement on a busy machine may find nothing to gain
        with mock.patch.multiple("tpkernels.overlap.calibrate", **SMALL_PROBES):
            calibration = tpk.tune(group, dtypes=[torch.float32])
        with tpk.log_collectives() as log:
            out = row(x)
        assert_close(out, linear(x), atol=0, rtol=0)
        tuned = row.explain(2048)
        assert f"schedule: {log[0].chunks} chunk" in tuned and calibration.measured_on in tuned
        if len(log) > 1:
            break
    return len(log), calibration.measured_on


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_auto_overlaps_over_a_slow_link(tmp_path):
    with Link() as link:
        link.set_rate(1)
        (chunks, place), other = link.run(overlapped, str(tmp_path))
    assert (chunks, place) == other and chunks > 1 and "over veth0" in place
