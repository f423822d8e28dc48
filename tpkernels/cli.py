"""The `tpkernels` command."""

from __future__ import annotations

import importlib
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from tpkernels_planner.cli import app as plan_app
from tpkernels_planner.files import write_atomically

from . import _C, __version__
from .demo.run import run_demo
from .group import resolve_group
from .kernels import registration
from .mesh import init_mesh
from .overlap.calibrate import tune as calibrate
from .overlap.calibration_cache import CalibrationKey
from .profiling.trace import print_report, read_trace, report

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures to this file.")
]

app = typer.Typer(
    help="Tensor parallelism with communication overlapped by compute.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(plan_app, name="plan")


def _fail(command: str, error: Exception) -> NoReturn:
    """Print the error as one line and end the command with 1."""
    Console(stderr=True).print(
        f"tpkernels {command}: {error}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    raise typer.Exit(1) from None


@app.command()
def demo(
    tp: Annotated[int, typer.Option(min=1, help="Ranks to shard the model over.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Shard SmolLM2-135M over ranks on this machine, train it, and compare with the full model."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"{json_file.absolute().parent} is not a folder", param_hint="--json"
        )
    try:
        run_demo(tp, steps, json_file)
    except (RuntimeError, ValueError) as error:
        _fail("demo", error)


@app.command()
def trace(
    file: Annotated[
        Path,
        typer.Argument(
            help="An SQLite export of Nsight Systems, or a .json[.gz] trace of torch.profiler."
        ),
    ],
    json_file: JsonFile = None,
) -> None:
    """Say how much of a recorded trace's communication ran under computation."""
    try:
        result = report(*read_trace(file))
        if json_file is not None:
            write_atomically(json_file, json.dumps(result, indent=2) + "\n")
    except (OSError, ValueError) as error:
        _fail("trace", error)
    print_report(result, Console())


@app.command()
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="ROWS,IN,OUT of a layer (IN: a rank's shard) whose real times are measured too."
        ),
    ] = None,
) -> None:
    """Measure GEMMs and the link between the ranks, and save that for `init_mesh`.

    On GPUs the kernels' configurations are measured too. Start it under torchrun, with as many
    ranks as the tensor-parallel group will have; rank 0 decides for all.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        if world == 1 and not torch.cuda.is_available():
            raise ValueError(
                "one process on CPUs has no link to measure: "
                "start it with `torchrun --nproc-per-node N --no-python tpkernels tune`"
            )
        shapes: Any = [tuple(int(size) for size in text.split(",")) for text in shape or ()]
        group = resolve_group(init_mesh(world)["tp"])
        calibration, key = calibrate(group, shapes), CalibrationKey.of(group)
    except ValueError as error:
        _fail("tune", error)
    if group.rank == 0:
        for dtype, timings in calibration.timings.items():
            print(f"{str(dtype)[6:]}: {timings.summary}")
        print(f"measured on {calibration.measured_on}, saved in {key.path}")
    dist.destroy_process_group()


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices and transports, for bug reports."""
    triton_version = None
    if registration.available():
        triton_version = importlib.import_module("triton").__version__
    facts = {
        "tpkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "transports": ["gloo", "shm", *["nccl"] * dist.is_nccl_available()],
        "dev_shm_free_bytes": _C.shm_free_bytes(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name}: {value}")
