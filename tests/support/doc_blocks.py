"""Blocks of a documentation page that start with `$ tpkernels plan ...` and show its output.

`python tests/doc_blocks.py PAGE` runs the commands and replaces the outputs.
"""

import re
import shlex
import sys
from pathlib import Path

from planner_cases import run_plan

BLOCK = re.compile(r"^```\n\$ (tpkernels plan[^\n]*)\n(.*?)^```$", re.M | re.S)


def output(command: str) -> str:
    """Return the output of a `tpkernels plan` command without blanks at its edges."""
    run = run_plan(*shlex.split(command)[2:], COLUMNS="215", NO_COLOR="1")
    assert run.returncode == 0, run.stderr
    return "".join(f"{line.rstrip()}\n" for line in run.stdout.strip().splitlines())


def refreshed(page: str) -> str:
    """Return the page with the output of every command replaced."""
    return BLOCK.sub(lambda block: f"```\n$ {block[1]}\n{output(block[1])}```", page)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(refreshed(Path(name).read_text()))
