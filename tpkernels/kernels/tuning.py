"""Measured launch configurations: rank 0 measures and decides, every rank uses its decision.

Ranks that compute a replicated result in different configurations would drift apart in its last
bits. So nothing is measured inside a forward, nor while a CUDA graph is captured: `tune` is a
call of its own. Rank 0 reads a saved table and hands it to the others.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tpkernels_planner.files import write_atomically

from ..cache import cache_folder
from .launch_config import Config, Tunable, power_of_two
from .registration import OP_MODULES

Measure = Callable[[Callable[[], object]], float]  # a call -> its time


def table_path(device: torch.device) -> Path:
    """Return the table's file in the user's cache folder; each kind of device has its own."""
    import triton  # deferred: heavy

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_folder() / f"kernels-{name.replace(' ', '-')}-triton-{triton.__version__}.json"


def tune(
    group: ProcessGroup,
    features: Iterable[int] = (1024, 2048, 4096, 8192, 16384),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    device: torch.device | str = "cuda",
    measure: Measure | None = None,
) -> dict[str, dict[str, Config]]:
    """Measure every kernel's candidates on the group's first rank, save and use the fastest.

    All ranks use the choices from now on. This takes a minute or two on a GPU.

    Collective: every rank of the group must call it.

    Args:
        group: its first rank measures, its ranks use the table.
        features: sizes of the last dimension; each stands for those down to half of it.
        dtypes: each stands for its element size.
        device: the device to measure on.
        measure: returns a call's time; None means triton.testing.do_bench's median in
            milliseconds.

    Returns:
        The table: kernel -> "features,itemsize" -> configuration.

    Raises:
        RuntimeError: a CUDA graph is being captured.

    Example:
        >>> tune(torch.distributed.group.WORLD, features=(4096,))  # doctest: +SKIP
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "tune() measures, which a CUDA graph cannot record: call it before the capture"
        )
    table: dict[str, dict[str, Config]] = {}
    if group.rank() == 0:
        table = _measure_all(features, dtypes, device, measure or _median_milliseconds)
        path = table_path(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table, indent=1))
    return install(table, group)


def _median_milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench  # deferred: heavy

    return cast(float, do_bench(call, return_mode="median"))


def _measure_all(
    features: Iterable[int], dtypes: Iterable[torch.dtype], device: torch.device, measure: Measure
) -> dict[str, dict[str, Config]]:
    sizes, dtypes = sorted({power_of_two(n) for n in features}), list(dtypes)
    return {
        name: {
            f"{size},{dtype.itemsize}": _fastest(tunable, size, dtype, device, measure)
            for dtype in dtypes
            for size in sizes
        }
        for name, tunable in _tunables().items()
    }


def _fastest(
    tunable: Tunable, features: int, dtype: torch.dtype, device: torch.device, measure: Measure
) -> Config:
    call, key = tunable.sample(features, dtype, device), (features, dtype.itemsize)
    before = tunable.chosen.get(key)
    times: list[tuple[float, int]] = []
    candidates = tunable.candidates(*key)
    try:
        for i, config in enumerate(candidates):
            tunable.chosen[key] = config
            try:
                times.append((measure(call), i))
            except Exception as error:
                # Some chips have too little shared memory for some configurations.
                if type(error).__name__ != "OutOfResources":
                    raise
    finally:
        if before is None:
            del tunable.chosen[key]
        else:
            tunable.chosen[key] = before
    return candidates[min(times)[1]]


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
    """Make every rank use rank 0's `table`; kernels that it does not have keep their choice.

    Collective: every rank of the group must call it.

    Args:
        table: kernel -> "features,itemsize" -> configuration; only rank 0's counts.
        group: its ranks use the table.

    Returns:
        Rank 0's table.
    """
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
