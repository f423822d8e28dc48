"""The benchmarks' saved results, grouped by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import formatting
from peers.registry import OUR_ALL_REDUCE, OUR_GEMM

Contenders = dict[str, dict[str, Any]]  # name -> extra_info of its benchmark, and "median", seconds
Found = dict[tuple[str, tuple], Contenders]  # (benchmark, case's parameters) -> contenders
Points = list[tuple[int, Contenders]]  # cases that differ in one parameter, and its values

# Parts of tpkernels' own time, measured beside the contenders.
PARTS = (
    "GEMM",
    "all-reduce",
    "tpkernels, overlap=False",
    "tpkernels, 4 chunks",
    "tpkernels, async",
)
STEPS = (OUR_ALL_REDUCE, OUR_GEMM)  # from the plain layers to tpkernels


def load(files: list[Path]) -> tuple[Found, list[dict]]:
    """Returns the results in the files and the files' heads (machine, commit, date).

    If several files have a case, the last one's figures count.
    """
    found: Found = {}
    heads = []
    for file in files:
        data = json.loads(file.read_text())
        heads.append({key: data[key] for key in ("machine_info", "commit_info", "datetime")})
        for record in data["benchmarks"]:
            info = record["extra_info"]
            if record["name"].startswith("test_link"):
                params = dict(record["params"])
                key, name = ("link", params), params.pop("variant")
            elif "params" in info:
                key, name = (info["name"], info["params"]), info.get("contender", "tpkernels")
            else:
                continue
            contenders = found.setdefault((key[0], tuple(key[1].items())), {})
            contenders[name] = {**info, "median": record["stats"]["median"]}
    return {key: value for key, value in found.items() if is_complete(key[0], value)}, heads


def is_complete(benchmark: str, contenders: Contenders) -> bool:
    """Returns whether a case has the figures that its ratios are taken to."""
    if benchmark == "link":
        return contenders.keys() >= {"gemm", "all_reduce", "serial", "auto"}
    return "tpkernels" in contenders


def newest(folder: Path) -> list[Path]:
    """Returns the newest saved results, and the newest of bench_link.py if there are any."""
    saved = sorted(folder.glob(".benchmarks/*/*.json"), key=lambda path: path.stat().st_mtime)
    links = [path for path in saved if '"test_link' in path.read_text()]
    others = [path for path in saved if path not in links]
    return [*others[-1:], *links[-1:]]


def series(found: Found, benchmark: str, axis: str) -> dict[str, Points]:
    """Groups the cases of a benchmark that differ in the parameter `axis` only.

    Returns:
        The points of each group, in the axis' order, by the parameters that they share.
    """
    groups: dict[str, Points] = {}
    for (name, params), contenders in found.items():
        shared = dict(params)
        if name == benchmark and axis in shared:
            value = shared.pop(axis)
            groups.setdefault(formatting.case(shared), []).append((value, contenders))
    return {shared: sorted(points, key=lambda p: p[0]) for shared, points in groups.items()}


def others(points: Points, skip: tuple[str, ...] = ()) -> list[str]:
    """Returns the contenders that tpkernels is compared with, as the suite lists them."""
    names = dict.fromkeys(
        name for _, contenders in points for name in contenders["tpkernels"].get("ratios", {})
    )
    return [name for name in names if name not in skip]
