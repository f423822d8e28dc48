"""Errors of a start: no compiled extension, no torchrun."""

import os
import subprocess
import sys
from pathlib import Path

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "tpkernels._C":
            raise ImportError("cannot import name '_C'")
sys.meta_path.insert(0, Hide())
import tpkernels
"""


def test_import_without_the_compiled_part_says_how_to_build_it():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", HIDE], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "tpkernels._C" in last
    assert "make setup" in last and "pip install --no-build-isolation ." in last


def test_init_mesh_without_torchrun_says_how_to_start():
    code = "import tpkernels as tpk; tpk.init_mesh(tp=2, dp=2, device='cpu')"
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=alone,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert (
        "ValueError: tp=2 * dp=2 is 4 ranks, but this job has 1: "
        "start it with `torchrun --nproc-per-node 4`" in done.stderr
    )
