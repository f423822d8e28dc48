"""Measured launch configurations: rank 0 measures and decides, every rank uses what it decided.

Ranks that computed a replicated result in different configurations would drift apart in its last bits. So nothing is ever measured
inside a forward (nor, therefore, while a CUDA graph is captured): `tune` is a call of its own, and a saved table is read by rank 0
and handed to the others.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tpkernels_planner.files import write_atomically

from ..cache import cache_folder
from .launch_config import Config, Tunable, power_of_two
from .registration import OP_MODULES


def table_path(device: torch.device) -> Path:
    """Where the table of a kind of device is kept, in the user's cache folder."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_folder() / f"kernels-{name.replace(' ', '-')}-triton-{triton.__version__}.json"


def tune(
    group: ProcessGroup,
    features: Iterable[int] = (1024, 2048, 4096, 8192, 16384),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    device: torch.device | str = "cuda",
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict[str, Config]]:
    """Measures every kernel's configurations on the group's first rank, saves the best, and makes all ranks use them from now on.

    Every rank of the group must call it. Takes a minute or two on a GPU.

    Args:
        features: sizes of the last dimension, each taken for those down to half of it.
        dtypes: an element size each.
        measure: a call's time; None means triton.testing.do_bench, the median in milliseconds.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "tune() measures, which a CUDA graph cannot record: call it before the capture"
        )
    table: dict[str, dict[str, Config]] = {}
    if group.rank() == 0:
        if measure is None:
            from triton.testing import do_bench

            def measure(call):
                return do_bench(call, return_mode="median")

        for tunable in _tunables().values():
            best = table.setdefault(tunable.name, {})
            for dtype in dtypes:
                for size in sorted({power_of_two(n) for n in features}):
                    best[f"{size},{dtype.itemsize}"] = _fastest(
                        tunable, size, dtype, device, measure
                    )
        path = table_path(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table, indent=1))
    return install(table, group)


def _fastest(
    tunable: Tunable, features: int, dtype: torch.dtype, device: torch.device, measure
) -> Config:
    call, key = tunable.sample(features, dtype, device), (features, dtype.itemsize)
    before, times = tunable.chosen.get(key), {}
    candidates = tunable.candidates(*key)
    try:
        for i, config in enumerate(candidates):
            tunable.chosen[key] = config
            try:
                times[i] = measure(call)
            except (
                Exception
            ) as error:  # a configuration that this chip has not the shared memory for
                if type(error).__name__ != "OutOfResources":
                    raise
    finally:
        if before is None:
            del tunable.chosen[key]
        else:
            tunable.chosen[key] = before
    return candidates[min(times, key=times.get)]


def load(group: ProcessGroup, device: torch.device | str = "cuda") -> dict[str, dict[str, Config]]:
    """Make all ranks use the table that the group's first rank saved, if it did.

    Rows whose block sizes have other names than the kernel's are left out: another version of
    tpkernels saved them.

    Collective: every rank of the group must call it.

    Args:
        group: its ranks use the table.
        device: the kind of device that the table was measured on.

    Returns:
        The table, as `tune` returns it; empty if there is none.
    """
    table: dict[str, dict[str, Config]] = {}
    path = table_path(torch.device(device))
    if group.rank() == 0 and path.exists():
        try:
            saved, tunables = json.loads(path.read_text()), _tunables()
            table = {
                name: _usable(tunables[name], saved[name])
                for name in saved.keys() & tunables.keys()
            }
        except (ValueError, TypeError, AttributeError) as error:
            # The other ranks wait for a table, whatever the state of this one.
            warnings.warn(
                f"{path} cannot be read ({error}): run `tpkernels tune` again", stacklevel=2
            )
    return install(table, group)


def _usable(tunable: Tunable, rows: dict[str, list[Any]]) -> dict[str, Config]:
    """Return the saved rows whose block sizes have the names that the kernel takes."""
    names = tunable.candidates(1, 4)[0].blocks.keys()
    configs = {key: Config(*row) for key, row in rows.items()}
    return {key: config for key, config in configs.items() if config.blocks.keys() == names}


def install(
    table: dict[str, dict[str, Config]], group: ProcessGroup
) -> dict[str, dict[str, Config]]:
    """Makes every rank use rank 0's `table`: kernel -> "features,itemsize" -> configuration. Kernels not in it keep theirs."""
    box = [table]
    dist.broadcast_object_list(box, group=group, group_src=0)
    for name, best in box[0].items():
        for key, config in best.items():
            features, itemsize = map(int, key.split(","))
            _tunables()[name].chosen[features, itemsize] = Config(*config)
    return box[0]


def _tunables() -> dict[str, Tunable]:
    for module in OP_MODULES:
        importlib.import_module(f"{__package__}.{module}")
    return Tunable.known
