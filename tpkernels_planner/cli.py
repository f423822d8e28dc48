"""`tpkernels plan`."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from . import jobs, report
from .advice import advice
from .files import write_atomically
from .jobs import VOCAB, make_job, parse_layout, sequences, sized_model
from .layout import Job, Layout
from .model import PlanError, count, load_model
from .search import Row, predict, search

ModelName = Annotated[
    str | None,
    typer.Option("--model", help="A named model, or the path of a Hugging Face config.json."),
]
Hidden = Annotated[
    int | None,
    typer.Option(help="Features between blocks; with --layers and --heads in place of --model."),
]
Layers = Annotated[int | None, typer.Option(help="Blocks.")]
Heads = Annotated[int | None, typer.Option(help="Query heads.")]
KvHeads = Annotated[
    int | None, typer.Option(help="Key and value heads; as many as heads if not said.")
]
Ffn = Annotated[
    int | None,
    typer.Option(help="Inner features of the MLP; 4 x hidden if not said, 8/3 if gated."),
]
Gated = Annotated[
    bool,
    typer.Option(
        help="A gated MLP, RMSNorm, rotary positions and no biases, as Llama has; else as GPT."
    ),
]
Vocab = Annotated[int, typer.Option(help="Tokens of the vocabulary.")]
Seq = Annotated[int | None, typer.Option(help=f"Tokens of a sequence [default: {jobs.SEQ}].")]
Gpu = Annotated[
    str, typer.Option(help="A named GPU, or the path of a JSON file that describes one.")
]
Gpus = Annotated[int, typer.Option(help="How many.")]
Batch = Annotated[str | None, typer.Option(help="Tokens of a step: 4194304, or 4M (4 x 2^20).")]
GlobalBatch = Annotated[
    str | None, typer.Option(help="Sequences of a step, in place of --batch-tokens.")
]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16, float32 [default: the GPU's 16-bit type].")
]
Software = Annotated[
    str | None,
    typer.Option(help="tpkernels (fused attention and loss, overlap) or megatron-2021 (neither)."),
]
PerNode = Annotated[int | None, typer.Option(help="GPUs of a node, in place of the file's.")]
Network = Annotated[
    float | None,
    typer.Option(help="Gbit/s of a GPU's share of its node's ports, in place of the file's."),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write JSON to this file; - prints nothing else.")
]
MaxPp = Annotated[
    int | None, typer.Option(help="Stages of a pipeline at most; 1: none, as tpkernels runs.")
]


class Asked(NamedTuple):
    job: Job
    batch: int  # sequences
    software: str | None  # what was said, if anything


def asked(
    model: ModelName = None,
    hidden: Hidden = None,
    layers: Layers = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    ffn: Ffn = None,
    gated: Gated = False,
    vocab: Vocab = VOCAB,
    seq: Seq = None,
    gpu: Gpu = "h100",
    batch_tokens: Batch = None,
    global_batch: GlobalBatch = None,
    dtype: Dtype = None,
    software: Software = None,
    gpus_per_node: PerNode = None,
    network_gbit: Network = None,
) -> Asked:
    """What every command is asked about: the job, and the sequences of a step."""
    sizes = {"--hidden": hidden, "--layers": layers, "--heads": heads}
    if model is not None:
        if said := [
            key
            for key, value in {**sizes, "--kv-heads": kv_heads, "--ffn": ffn}.items()
            if value is not None
        ]:
            raise PlanError(f"--model={model} has its own sizes: leave {', '.join(said)} out")
        chosen = load_model(model)
    else:
        if missing := [key for key, value in sizes.items() if value is None]:
            raise PlanError(
                f"pass --model, or sizes: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            )
        chosen = sized_model(hidden, layers, heads, vocab, kv_heads, ffn, gated, seq or jobs.SEQ)
    job = make_job(
        chosen,
        gpu,
        seq,
        dtype=dtype,
        software=software,
        gpus_per_node=gpus_per_node,
        network_gbit=network_gbit,
    )
    return Asked(job, sequences(job.seq, batch_tokens, global_batch), software)


def refuses(function: Callable) -> Callable:
    """What cannot be planned is an error of one line."""

    @functools.wraps(function)
    def run(**options):
        try:
            return function(**options)
        except BrokenPipeError:  # `| head`: click ends that quietly
            raise
        except (PlanError, OSError) as error:
            Console(stderr=True).print(
                f"tpkernels plan: {error}",
                style="red",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(1) from None

    return run


def command(function: Callable) -> Callable:
    """The function with `asked`'s options in the place of its first parameter; it refuses."""
    shared = inspect.signature(asked, eval_str=True).parameters
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

    def run(**options):
        return function(asked(**{name: options.pop(name) for name in shared}), **options)

    run.__signature__ = inspect.Signature(
        [p.replace(kind=p.KEYWORD_ONLY) for p in (*shared.values(), *own)]
    )
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return refuses(run)


def put_json(path: Path | None, data: dict) -> bool:
    """Whether that is all that is to be printed."""
    if path is None:
        return False
    text = json.dumps(data, indent=2) + "\n"
    if str(path) == "-":
        print(text, end="")
        return True
    write_atomically(path, text)
    return False


@command
def plan(
    given: Asked,
    gpus: Gpus = 8,
    max_pp: MaxPp = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 8,
    sweep: Annotated[
        str | None, typer.Option(help="gpus: a curve over 1, 2, 4 ... --gpus instead of the table.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also draw the rows, or the curve, to this .svg, .png or .pdf."),
    ] = None,
    json_file: Json = None,
) -> None:
    job, batch, _ = given
    if sweep not in (None, "gpus"):
        raise PlanError(f"--sweep={sweep} is nothing to sweep: gpus is")
    if picture is not None:
        report.pyplot(picture)
    model = job.model
    title = f"{model.name or 'the model'}, {model.parameters / 1e9:.2f}B parameters, {batch} x {job.seq} tokens a step, {job.hardware.title}"
    if sweep:
        _sweep(job, gpus, batch, max_pp, title, picture, json_file)
        return
    found = search(job, gpus, batch, max_pp)
    words, rows = advice(found), list(found.rows[:top])
    if picture is not None:
        report.draw(rows, picture, title)
    if put_json(json_file, report.plan_dict(found, words, top)):
        return
    console = Console()
    console.print(report.plan_table(rows, f"{title}: {gpus} of them", console.width))
    for name, what in report.traffic(found.best).items():
        carried = f"{what['calls']} x {what['bytes_each'] / 1e6:.1f} MB = {what['bytes'] / 1e9:.1f} GB a GPU and step"
        print(f"{name}: {carried}, over {what['link']}")
    for sentence in words:
        print(f"- {sentence}")


class Group(typer.core.TyperGroup):
    """`tpkernels plan --model ...` is `tpkernels plan layouts --model ...`."""

    def parse_args(self, context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h"):
            args = ["layouts", *args]
        return super().parse_args(context, args)


app = typer.Typer(
    cls=Group,
    help="When TP, when FSDP, when both, and what it will cost.",
    no_args_is_help=True,
    add_completion=False,
)
app.command(
    "layouts",
    help="The best layouts of a model on GPUs: memory, communication, step time, and the reasons (also without `layouts`).",
)(plan)


def _sweep(
    job: Job,
    most: int,
    batch: int,
    max_pp: int | None,
    title: str,
    picture: Path | None,
    json_file: Path | None,
) -> None:
    kinds: dict[str, Callable[[Layout], bool]] = {
        "best": lambda layout: True,
        "no TP, no pipeline (DP, FSDP)": lambda layout: layout.tp == 1 and layout.pp == 1,
        "TP with DP or FSDP": lambda layout: layout.tp > 1 and layout.pp == 1,
    }
    count("gpus", most)
    found: dict[int, dict[str, Row] | PlanError] = {}
    for gpus in (2**i for i in range(most.bit_length())):
        try:
            plan = search(job, gpus, batch, max_pp)
            found[gpus] = {
                kind: row for kind, wanted in kinds.items() if (row := plan.first(wanted))
            }
        except PlanError as error:
            found[gpus] = error
    fitting = {gpus: rows for gpus, rows in found.items() if not isinstance(rows, PlanError)}
    if not fitting:
        raise PlanError(f"no number of GPUs up to {most} fits: {found[gpus]}")
    if picture is not None:
        points = [
            (gpus, {kind: row.tokens_per_s / gpus for kind, row in rows.items()})
            for gpus, rows in fitting.items()
        ]
        report.draw_sweep(points, picture, title)
    data = [
        {
            "gpus": gpus,
            **(
                {kind: report.as_dict(row) for kind, row in rows.items()}
                if gpus in fitting
                else {"error": str(rows)}
            ),
        }
        for gpus, rows in found.items()
    ]
    if put_json(json_file, {"sweep": data}):
        return
    print(title)
    for gpus, rows in found.items():
        if gpus not in fitting:
            print(f"{gpus:6} GPUs: {rows}")
            continue
        text = "; ".join(f"{kind} {row.tokens_per_s / gpus:,.0f}" for kind, row in rows.items())
        print(f"{gpus:6} GPUs, tokens/s a GPU: {text}   ({rows['best'].layout.words()})")


@app.command("predict")
@command
def predict_command(
    given: Asked,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 1,
    micro_batch: Annotated[int, typer.Option(help="Sequences of one pass.")] = 1,
    interleave: Annotated[int, typer.Option(help="Model chunks of a stage.")] = 1,
    recompute: Annotated[str, typer.Option(help="none, selective or full.")] = "none",
    sequence_parallel: Annotated[
        bool,
        typer.Option("--sequence-parallel", help="Norms and residual split over the TP ranks too."),
    ] = False,
    zero: Annotated[int, typer.Option(help="0 to 3: what the data-parallel ranks share out.")] = 0,
    json_file: Json = None,
    arithmetic: Annotated[bool, typer.Option("--explain", help="Print the arithmetic.")] = False,
) -> None:
    """One layout's step time, FLOP/s and memory; --software is what the GPU's own measured rows ran, unless said."""
    job = given.job if given.software else replace(given.job, software=given.job.hardware.software)
    row = predict(
        job,
        Layout(
            tp, pp, dp, micro_batch, given.batch, interleave, recompute, sequence_parallel, zero
        ),
    )
    if put_json(json_file, report.as_dict(row)):
        return
    if arithmetic:
        print(report.explain(row))
    else:
        Console().print(report.compare_table([row]))


@app.command("compare")
@command
def compare_command(
    given: Asked,
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
    rows = [predict(given.job, parse_layout(text, gpus, given.batch)) for text in layouts]
    if not put_json(json_file, {"rows": [report.as_dict(row) for row in rows]}):
        Console().print(report.compare_table(rows))


@app.command("explain")
@command
def explain_command(
    given: Asked,
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
    if layout is not None:
        chosen = predict(given.job, parse_layout(layout, gpus, given.batch))
    else:
        rows = search(given.job, gpus, given.batch, max_pp).rows
        if row > len(rows):
            raise PlanError(f"--row={row}: the plan has {len(rows)} rows")
        chosen = rows[row - 1]
    print(report.explain(chosen))


def checkout_tool(name: str) -> ModuleType:
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
@refuses
def fit_command() -> None:
    """Fit the constants to data/measured and write data/fitted.json (a minute; needs scipy)."""
    checkout_tool("fit").write_fit()


@app.command("validate")
@refuses
def validate_command(
    page: Annotated[
        Path | None,
        typer.Option(
            help="Also write the tables into this page, its plot and every row beside it."
        ),
    ] = None,
) -> None:
    """Hold every measured row against its prediction."""
    validate = checkout_tool("validate")
    if page is None:
        validate.print_errors()
    else:
        validate.write_page(page)
