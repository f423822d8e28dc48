"""PyTorch's own distributed tests, rewritten to run over shm and on CPU devices.

The tests ship in torch's wheel (torch/testing/_internal/distributed/distributed_test.py). They
choose what to run by the name of the backend, and know gloo's name but not shm's: so they are
imported for gloo, and their process groups are then started with shm. Tests of CUDA tensors are
rewritten to CPU tensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

NAME = "torch.testing._internal.distributed.distributed_test"
DECORATORS = ("skip_if_lt_x_gpu", "nccl_skip_if_lt_x_gpu", "require_n_gpus_for_nccl_backend")


class BackendName(str):
    """A backend's name that the tests' comparisons take for gloo's."""

    def __eq__(self, other) -> bool:
        return other == "gloo" or str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash("gloo")


def replace_arguments(text: str, opening: str, replacement: str) -> str:
    """Replace every `opening`, which ends in a bracket, up to the bracket that closes it."""
    pieces, position = [], 0
    while (start := text.find(opening, position)) >= 0:
        stop, depth = start + len(opening), 1
        while depth:
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(text[stop], 0)
            stop += 1
        pieces += [text[position:start], replacement]
        position = stop
    return "".join([*pieces, text[position:]])


def on_cpu(text: str) -> str:
    """Rewrite the tests' source so that what they do on CUDA devices is done on the CPU."""
    text = text.replace("@skip_if_no_gpu\n", "\n")
    for name in DECORATORS:
        text = replace_arguments(text, f"@{name}(", "")
    text = replace_arguments(text, ".cuda(", ".cpu()")
    text = replace_arguments(text, "device_ids=[", "device_ids=None")
    text = text.replace("device_ids=gpu_subset", "device_ids=None")
    text = text.replace("device_ids=device_ids", "device_ids=None")
    text = text.replace('output_device=torch.device("cuda")', "output_device=None")
    text = re.sub(r"output_device=(?!None)[\w.\[\]]+", "output_device=None", text)
    text = re.sub(
        r'torch\.device\(f?"cuda[^"]*"[^()]*(\([^()]*\))?[^()]*\)', 'torch.device("cpu")', text
    )
    text = re.sub(r"\.to\((self\.rank|rank|device_id|next_rank)\)", '.to("cpu")', text)
    text = re.sub(r"\bdevice=(self\.rank|rank|device_id|next_rank)\b", 'device="cpu"', text)
    text = re.sub(r"torch\.device\((self\.rank|rank)\)", 'torch.device("cpu")', text)
    return re.sub(r'(?<!feature\[)f?"cuda(:[^"]*)?"', '"cpu"', text)


def without_cuda() -> None:
    """Let calls of torch.cuda that only choose a device or a stream do nothing."""
    for name in ("set_device", "manual_seed", "synchronize"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = lambda *args, **kwargs: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def load(backend: str, world_size: int) -> ModuleType:
    """Import torch's tests for `world_size` ranks over `backend`."""
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(world_size))
    without_cuda()
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    source = on_cpu(Path(spec.origin).read_text())
    exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)
    module.BACKEND = BackendName(backend)
    module.init_multigpu_helper = lambda size, backend: {rank: [rank] for rank in range(size)}
    return module
