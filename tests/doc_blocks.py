"""Blocks of a page that start with `$ command`: what the command prints follows. `python tests/doc_blocks.py PAGE` runs them anew."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```\n\$ (tpkernels plan[^\n]*)\n(.*?)^```$", re.M | re.S)


def output(command: str) -> str:
    code = "from tpkernels_command import main; main()"
    environment = {**os.environ, "COLUMNS": "215", "NO_COLOR": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return "".join(f"{line.rstrip()}\n" for line in run.stdout.strip().splitlines())


def refreshed(page: str) -> str:
    return BLOCK.sub(lambda block: f"```\n$ {block[1]}\n{output(block[1])}```", page)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(refreshed(Path(name).read_text()))
