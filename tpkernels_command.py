"""The `tpkernels` command's entry point, outside the package: `tpkernels plan` answers in half a second because it never executes
`tpkernels/__init__.py`, which imports torch."""

import importlib.util
import sys


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        spec = importlib.util.find_spec("tpkernels")
        sys.modules["tpkernels"] = importlib.util.module_from_spec(
            spec
        )  # its submodules are found; the planner needs no more
    from tpkernels.cli import app

    app()
