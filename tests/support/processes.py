"""Commands as a user starts them, on one process and on ranks."""

import os
import subprocess
import sys


def command(*args):
    # The demo divides the cores among its ranks by itself.
    return subprocess.run(
        [sys.executable, "-m", "tpkernels", *args],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "COLUMNS": "120"},
    )


def torchrun(*args, **variables):
    """Run a script, or with --no-python a command, on two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **variables}
    return subprocess.run([*launch, *args], capture_output=True, text=True, timeout=300, env=env)
