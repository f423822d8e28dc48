"""The `tpkernels` command.

This module stands outside the package `tpkernels`, because importing that package imports torch.
`tpkernels plan` answers without torch.
"""

import sys


def main() -> None:
    """Run `tpkernels plan` from the planner, without torch, and the rest from `tpkernels`."""
    # Each branch imports only the package that it runs.
    if sys.argv[1:2] == ["plan"]:
        from tpkernels_planner.cli import app

        app(sys.argv[2:], prog_name="tpkernels plan")
    else:
        from tpkernels.cli import app

        app()
