"""Training jobs: a model on GPUs, which a layout completes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .errors import PlanError, unknown_name, whole_number
from .hardware import Hardware, load_hardware
from .model import Model
from .model_config import SEQ

# megatron-2021 is the software of the measured A100 rows: attention in three kernels that keep the
# matrix of scores, dropout, no overlap. tpkernels has fused attention and loss, no dropout,
# all-reduces in chunks under GEMMs, and reduces gradients under the backward pass.
SOFTWARE = ("megatron-2021", "tpkernels")


@dataclass(frozen=True)
class Job:
    """A model to train, and the hardware and software to train it with.

    Attributes:
        model, hardware: the model and one of the GPUs.
        seq: tokens of a sequence.
        dtype: dtype of parameters and activations.
        software: one of SOFTWARE.

    Example:
        >>> from tpkernels_planner import load_model, make_job
        >>> job = make_job(load_model("llama-7b"), "h100", seq=2048)
        >>> job.dtype, job.software, job.element_bytes
        ('bfloat16', 'tpkernels', 2)
    """

    model: Model
    hardware: Hardware
    seq: int
    dtype: str
    software: str

    @property
    def is_megatron(self) -> bool:
        """The software is megatron-2021."""
        return self.software == "megatron-2021"

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter or an activation."""
        return 4 if self.dtype in ("float32", "tf32") else 2

    @property
    def peak_flops_per_s(self) -> float:
        """Peak FLOP/s of one GPU in the job's dtype."""
        return self.hardware.peak(self.dtype)


def make_job(
    model: Model,
    gpu: str,
    seq: int | None,
    *,
    dtype: str | None = None,
    software: str | None = None,
    gpus_per_node: int | None = None,
    network_gbit: float | None = None,
) -> Job:
    """Make a job from a user's options.

    Args:
        model: the model to train.
        gpu, seq, dtype, software, gpus_per_node, network_gbit: as `tpkernels_planner.plan` takes
            them.

    Raises:
        PlanError: an unknown name, or a number that makes no sense.

    Example:
        >>> from tpkernels_planner import load_model, make_job
        >>> make_job(load_model("llama-7b"), "a100-80", seq=None, network_gbit=100).hardware.network
        Link(kind='100 Gbit/s a GPU', bus_bytes_per_s=12500000000.0)
    """
    hardware = load_hardware(gpu)
    if gpus_per_node is not None:
        nodes = whole_number("gpus_per_node", gpus_per_node)
        hardware = replace(hardware, gpus_per_node=nodes)
    if network_gbit is not None:
        if not 0 < network_gbit < math.inf:
            raise PlanError(
                f"network_gbit must be positive, got {network_gbit!r}: "
                "Gbit/s of each GPU's share of the node's ports"
            )
        network = replace(
            hardware.network,
            kind=f"{network_gbit:g} Gbit/s a GPU",
            bus_bytes_per_s=network_gbit / 8 * 1e9,
        )
        hardware = replace(hardware, network=network)
    dtype = dtype or hardware.training_dtype
    hardware.peak(dtype)
    software = software or "tpkernels"
    if software not in SOFTWARE:
        raise unknown_name("software", software, SOFTWARE)
    return Job(model, hardware, whole_number("seq", SEQ if seq is None else seq), dtype, software)


def amount(text: str | int, name: str) -> int:
    """Parse a positive whole number such as 4194304, "512k" or "4M" (4 * 2**20, as of batches).

    Args:
        text: the number.
        name: its argument's name in errors.

    Raises:
        PlanError: it is not one.

    Example:
        >>> amount("4M", "batch_tokens")
        4194304
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return whole_number(name, text)
    units = {"k": 2**10, "m": 2**20, "g": 2**30, "": 1}
    text = str(text).strip()
    digits = text.rstrip("kKmMgG")
    try:
        value = float(digits) * units[text[len(digits) :].lower()]
    except (KeyError, ValueError):
        raise PlanError(f"{name}={text!r} is no number: write 4194304 or 4M") from None
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise PlanError(f"{name} must be a whole number of at least 1, got {text!r}")
    return int(value)


def sequences(
    seq: int,
    batch_tokens: int | str | None = None,
    global_batch: int | str | None = None,
) -> int:
    """Return the sequences of a step, from its tokens or its sequences.

    Args:
        seq: tokens of a sequence.
        batch_tokens: tokens of a step.
        global_batch: sequences of a step.

    Raises:
        PlanError: neither or both are given, or fewer tokens than a sequence has.
    """
    if global_batch is not None and batch_tokens is None:
        return amount(global_batch, "global_batch")
    if batch_tokens is None or global_batch is not None:
        raise PlanError(
            "pass one of batch_tokens (tokens of a step) and global_batch (sequences of a step)"
        )
    tokens = amount(batch_tokens, "batch_tokens")
    if tokens < seq:
        raise PlanError(
            f"batch_tokens={tokens} is less than a sequence of seq={seq}: "
            "pass more, or a smaller seq"
        )
    return tokens // seq
