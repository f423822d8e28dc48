"""`tpkernels plan`."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .advice import advice
from .collectives import traffic
from .errors import PlanError
from .explain import explain
from .files import write_atomically
from .layout import parse_layout
from .options import Gpus, JobOptions, Json, LayoutOptions, MaxPp, Request, command
from .pictures import draw_rows, draw_sweep, pyplot
from .records import choice_record, prediction_record
from .search import predict, search
from .sweep import sweep
from .tables import choice_table, compare_table


class _DefaultToLayouts(TyperGroup):
    """`tpkernels plan --model ...` is `tpkernels plan layouts --model ...`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h"):
            args = ["layouts", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultToLayouts,
    help="When TP, when FSDP, when both, and what it will cost.",
    no_args_is_help=True,
    add_completion=False,
)


def _write_json(path: Path | None, record: dict[str, Any]) -> bool:
    """Write JSON to a file if there is one. Return True if it went to stdout, for "-"."""
    if path is None:
        return False
    text = json.dumps(record, indent=2) + "\n"
    if str(path) == "-":
        print(text, end="")
        return True
    write_atomically(path, text)
    return False


def _title(request: Request) -> str:
    """Describe the model, the batch and the GPU."""
    job = request.job
    return (
        f"{job.model.name or 'the model'}, {job.model.parameters / 1e9:.2f}B parameters, "
        f"{request.global_batch} x {job.seq} tokens a step, {job.hardware.title}"
    )


@app.command(
    "layouts",
    help="The best layouts of a model on GPUs: memory, communication, step time, and the reasons "
    "(also without `layouts`).",
)
@command
def layouts_command(
    job_options: JobOptions,
    gpus: Gpus = 8,
    max_pp: MaxPp = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 8,
    sweep_over: Annotated[
        str | None,
        typer.Option("--sweep", help="gpus: a curve over 1, 2, 4 ... --gpus instead of the table."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also draw the rows, or the curve, to this .svg, .png or .pdf."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Print the best layouts, or a sweep over the number of GPUs."""
    request = job_options.request()
    if sweep_over not in (None, "gpus"):
        raise PlanError(f"--sweep={sweep_over} is nothing to sweep: gpus is")
    if picture is not None:
        pyplot(picture)  # raises before the search
    if sweep_over:
        _print_sweep(request, gpus, max_pp, picture, json_file)
        return
    choice = search(request.job, gpus, request.global_batch, max_pp)
    sentences = advice(choice)
    rows = list(choice.rows[:top])
    if picture is not None:
        draw_rows(rows, picture, _title(request))
    if _write_json(json_file, choice_record(choice, sentences, top)):
        return
    console = Console()
    console.print(choice_table(rows, f"{_title(request)}: {gpus} of them", console.width))
    for name, carried in traffic(request.job, choice.best.layout).items():
        print(
            f"{name}: {carried.calls} x {carried.bytes_each / 1e6:.1f} MB = "
            f"{carried.bytes / 1e9:.1f} GB a GPU and step, over {carried.link}"
        )
    for sentence in sentences:
        print(f"- {sentence}")


def _print_sweep(
    request: Request,
    gpus: int,
    max_pp: int | None,
    picture: Path | None,
    json_file: Path | None,
) -> None:
    """Print, and draw, the best layouts over the number of GPUs."""
    points = sweep(request.job, gpus, request.global_batch, max_pp)
    if picture is not None:
        draw_sweep(points, picture, _title(request))
    if _write_json(json_file, {"sweep": [point.record() for point in points]}):
        return
    print(_title(request))
    for point in points:
        print(point.text())


@app.command(
    "predict",
    help="One layout's step time, FLOP/s and memory; "
    "--software is what the GPU's own measured rows ran, unless said.",
)
@command
def predict_command(
    job_options: JobOptions,
    layout_options: LayoutOptions,
    json_file: Json = None,
    arithmetic: Annotated[bool, typer.Option("--explain", help="Print the arithmetic.")] = False,
) -> None:
    """Print one layout's prediction."""
    job, global_batch = job_options.request()
    if not job_options.software:
        job = replace(job, software=job.hardware.software)
    row = predict(job, layout_options.layout(global_batch))
    if _write_json(json_file, prediction_record(row)):
        return
    if arithmetic:
        print(explain(row))
    else:
        Console().print(compare_table([row]))


@app.command("compare")
@command
def compare_command(
    job_options: JobOptions,
    layouts: Annotated[
        list[str],
        typer.Argument(
            help='Layouts such as "tp=8,zero=1" or "tp=4,pp=2,sp,micro-batch=2,recompute=full".'
        ),
    ],
    gpus: Gpus = 8,
    json_file: Json = None,
) -> None:
    """Layouts of one model side by side; DP is what --gpus leaves."""
    job, global_batch = job_options.request()
    rows = [predict(job, parse_layout(text, gpus, global_batch)) for text in layouts]
    if not _write_json(json_file, {"rows": [prediction_record(row) for row in rows]}):
        Console().print(compare_table(rows))


@app.command("explain")
@command
def explain_command(
    job_options: JobOptions,
    layout: Annotated[
        str | None, typer.Argument(help='A layout such as "tp=8,zero=1"; the best if none is said.')
    ] = None,
    row: Annotated[
        int, typer.Option(min=1, help="The row of the plan's table, where no layout is said.")
    ] = 1,
    gpus: Gpus = 8,
    max_pp: MaxPp = None,
) -> None:
    """One row's arithmetic, every formula with its numbers and its source."""
    job, global_batch = job_options.request()
    if layout is not None:
        chosen = predict(job, parse_layout(layout, gpus, global_batch))
    else:
        rows = search(job, gpus, global_batch, max_pp).rows
        if row > len(rows):
            raise PlanError(f"--row={row}: the plan has {len(rows)} rows")
        chosen = rows[row - 1]
    print(explain(chosen))


def _checkout_tool(name: str) -> ModuleType:
    """Import tools/planner/<name>.py of the checkout that this package stands in.

    Raises:
        PlanError: the package is installed without its repository.
    """
    root = Path(__file__).parents[1]
    if not (root / "tools" / "planner").is_dir():
        raise PlanError(
            f"{name} needs a checkout of the tpkernels repository, where the measured steps are"
        )
    sys.path.insert(0, str(root))
    return importlib.import_module(f"tools.planner.{name}")


@app.command("fit")
@command
def fit_command() -> None:
    """Fit the constants to the measured steps, in a checkout (a minute; needs scipy)."""
    _checkout_tool("fit").write_fit()


@app.command("validate")
@command
def validate_command(
    page: Annotated[
        Path | None,
        typer.Option(
            help="Also write the tables into this page, its plot and every row beside it."
        ),
    ] = None,
) -> None:
    """Hold every measured row against its prediction."""
    validate = _checkout_tool("validate")
    if page is None:
        validate.print_errors()
    else:
        validate.write_page(page)
