"""python -m tpkernels: the `tpkernels` command."""

from .cli import app

app()
