"""Options that several commands of `tpkernels plan` share, and the decorator that adds them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from typer import Option

from .errors import PlanError
from .job import Job, make_job, sequences
from .layout import Layout
from .model import Model
from .model_config import SEQ, VOCAB, gpt_model, llama_model, load_model

Gpus = Annotated[int, Option(help="How many.")]
MaxPp = Annotated[
    int | None, Option(help="Stages of a pipeline at most; 1: none, as tpkernels runs.")
]
Json = Annotated[
    Path | None, Option("--json", help="Also write JSON to this file; - prints nothing else.")
]


class Request(NamedTuple):
    """A job and the sequences of a step."""

    job: Job
    global_batch: int


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """The options of a job and its batch. Typer reads the fields' annotations."""

    model: Annotated[
        str | None,
        Option("--model", help="A named model, or the path of a Hugging Face config.json."),
    ] = None
    hidden: Annotated[
        int | None,
        Option(help="Features between blocks; with --layers and --heads in place of --model."),
    ] = None
    layers: Annotated[int | None, Option(help="Blocks.")] = None
    heads: Annotated[int | None, Option(help="Query heads.")] = None
    kv_heads: Annotated[
        int | None, Option(help="Key and value heads; as many as heads if not said.")
    ] = None
    ffn: Annotated[
        int | None,
        Option(help="Inner features of the MLP; 4 x hidden if not said, 8/3 if gated."),
    ] = None
    gated: Annotated[
        bool,
        Option(
            help="A gated MLP, RMSNorm, rotary positions and no biases, as Llama has; else as GPT."
        ),
    ] = False
    vocab: Annotated[int, Option(help="Tokens of the vocabulary.")] = VOCAB
    seq: Annotated[int | None, Option(help=f"Tokens of a sequence [default: {SEQ}].")] = None
    gpu: Annotated[
        str, Option(help="A named GPU, or the path of a JSON file that describes one.")
    ] = "h100"
    batch_tokens: Annotated[
        str | None, Option(help="Tokens of a step: 4194304, or 4M (4 x 2^20).")
    ] = None
    global_batch: Annotated[
        str | None, Option(help="Sequences of a step, in place of --batch-tokens.")
    ] = None
    dtype: Annotated[
        str | None,
        Option(help="bfloat16, float16, float32 [default: the GPU's 16-bit type]."),
    ] = None
    software: Annotated[
        str | None,
        Option(help="tpkernels (fused attention and loss, overlap) or megatron-2021 (neither)."),
    ] = None
    gpus_per_node: Annotated[int | None, Option(help="GPUs of a node, in place of the file's.")] = (
        None
    )
    network_gbit: Annotated[
        float | None,
        Option(help="Gbit/s of a GPU's share of its node's ports, in place of the file's."),
    ] = None

    def _chosen_model(self) -> Model:
        """Load the named model, or make one of the sizes.

        Raises:
            PlanError: both are given, or neither, or the model makes no sense.
        """
        sizes = {"--hidden": self.hidden, "--layers": self.layers, "--heads": self.heads}
        if self.model is not None:
            sizes |= {"--kv-heads": self.kv_heads, "--ffn": self.ffn}
            given = [key for key, value in sizes.items() if value is not None]
            if given:
                raise PlanError(
                    f"--model={self.model} has its own sizes: leave {', '.join(given)} out"
                )
            return load_model(self.model)
        if self.hidden is None or self.layers is None or self.heads is None:
            missing = [key for key, value in sizes.items() if value is None]
            verb = "is" if len(missing) == 1 else "are"
            raise PlanError(f"pass --model, or sizes: {', '.join(missing)} {verb} missing")
        shape = (self.hidden, self.layers, self.heads, self.vocab, self.kv_heads, self.ffn)
        return llama_model(*shape) if self.gated else gpt_model(*shape, self.seq or SEQ)

    def request(self) -> Request:
        """Make the job and its batch.

        Raises:
            PlanError: an unknown name, a missing option, or a number that makes no sense.
        """
        job = make_job(
            self._chosen_model(),
            self.gpu,
            self.seq,
            dtype=self.dtype,
            software=self.software,
            gpus_per_node=self.gpus_per_node,
            network_gbit=self.network_gbit,
        )
        return Request(job, sequences(job.seq, self.batch_tokens, self.global_batch))


@dataclasses.dataclass(frozen=True)
class LayoutOptions:
    """The options of one layout, without its batch."""

    tp: Annotated[int, Option(help="Tensor-parallel ranks.")] = 1
    pp: Annotated[int, Option(help="Pipeline stages.")] = 1
    dp: Annotated[int, Option(help="Data-parallel ranks.")] = 1
    micro_batch: Annotated[int, Option(help="Sequences of one pass.")] = 1
    interleave: Annotated[int, Option(help="Model chunks of a stage.")] = 1
    recompute: Annotated[str, Option(help="none, selective or full.")] = "none"
    sequence_parallel: Annotated[
        bool,
        Option("--sequence-parallel", help="Norms and residual sharded over the TP ranks too."),
    ] = False
    zero: Annotated[int, Option(help="0 to 3: what the data-parallel ranks shard.")] = 0

    def layout(self, global_batch: int) -> Layout:
        """Return the layout for a batch."""
        return Layout(global_batch=global_batch, **dataclasses.asdict(self))


def print_plan_error(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: print PlanError and OSError as one line and exit with 1."""

    @functools.wraps(function)
    def run(**options) -> None:
        try:
            function(**options)
        except BrokenPipeError:  # click ends `| head` quietly
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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: replace every parameter that is a dataclass of options by its fields.

    Typer reads a command's options from its signature. The decorated function's signature has the
    fields in the parameter's place. Errors are printed as `print_plan_error` does.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += inspect.signature(kind).parameters.values()
        else:
            parameters.append(parameter)

    @print_plan_error
    @functools.wraps(function)
    def run(**options) -> None:
        made = {
            name: group(
                **{field.name: options.pop(field.name) for field in dataclasses.fields(group)}
            )
            for name, group in groups.items()
        }
        function(**made, **options)

    del run.__wrapped__  # typer would read the function's own signature
    run.__signature__ = inspect.Signature(
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
