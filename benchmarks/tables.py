"""The generated sections of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable

from formatting import number, ratio, seconds, size, times, tokens
from results import PARTS, STEPS, Contenders, Found, Points, others, series

LAYERS = ("mlp", "block", "row_linear", "column_linear")
LEAST_SHARE = 0.05  # of a layer's time that communication must take for "hidden" to mean anything
DASH = "-"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def ratio_table(
    points: Points, axis: str, words: Callable[[int], str], skip: tuple[str, ...] = ()
) -> list[str]:
    """Returns tpkernels' time and the ratios of the others' times to it, a row for each point."""
    names = others(points, skip)
    rows = []
    for value, contenders in points:
        ours = contenders["tpkernels"]
        time = ours["components"].get("overlapped", ours["median"])
        ratios = [ratio(ours["ratios"].get(name)) for name in names]
        rows.append([words(value), seconds(time), *ratios])
    return table([axis, "tpkernels", *names], rows)


def hidden(share: float, communication: float, time: float) -> str:
    """Returns the share of communication that overlap hides, or a dash if there is too little."""
    return f"{100 * share:.0f}%" if communication >= LEAST_SHARE * time else DASH


def all_reduce(found: Found) -> list[str]:
    lines = []
    for shared, points in series(found, "all_reduce", "bytes").items():
        lines += [f"**{shared}**", "", *ratio_table(points, "size", size)]
    return lines


def gains_table(points: Points) -> list[str]:
    """Returns the gain of each step from the plain layers over gloo or NCCL to tpkernels."""
    gains = [(count, c["tpkernels"]["components"].get("gains")) for count, c in points]
    steps = ("all-reduce", "GEMM", "fused op")
    rows = [[tokens(count), *(ratio(of[step]) for step in steps)] for count, of in gains if of]
    head = ["gain of", "tpkernels' all-reduce", "its GEMM", "its fused, overlapped op"]
    return table(head, rows) if rows else []


def parts_row(contenders: Contenders) -> list[str]:
    ours = contenders["tpkernels"]
    of = ours["components"]
    parts = ("GEMM", "all-reduce", "serial", "overlapped", "ideal")
    row = [seconds(of[part]) if part in of else "" for part in parts]
    exposed, share = "", ""
    if "GEMM" in of:
        exposed = number(1e6 * (of["overlapped"] - of["GEMM"]))
    if "hidden" in of:
        share = hidden(of["hidden"], of["all-reduce"], of["overlapped"])
    row += [exposed, share]
    return row + [
        ratio(ours["ratios"].get(f"tpkernels, {o}")) for o in ("overlap=False", "4 chunks")
    ]


def parts_table(points: Points) -> list[str]:
    """Returns the parts of tpkernels' time, a row for each point."""
    head = ["", "GEMM only", "all-reduce only", "serial", "overlapped", "ideal: max"]
    head += ["exposed µs", "hidden", "serial / overlapped", "4 chunks / overlapped"]
    rows = [[tokens(count), *parts_row(contenders)] for count, contenders in points]
    if not any(row[-1] for row in rows):
        return table(head[:-1], [row[:-1] for row in rows])
    return table(head, rows)


def memory_table(contenders: Contenders) -> list[str]:
    kinds = ("parameters", "resident", "peak of a call")
    rows = []
    for name, record in contenders.items():
        if name not in PARTS:
            memory = record["memory"]
            cells = [f"{memory[kind] / 2**20:.1f}" if kind in memory else "" for kind in kinds]
            rows.append([name, *cells])
    head = ["", "parameters", "resident after the first call", "more at a training step's peak"]
    return table(head, rows)


def layer(found: Found, name: str) -> list[str]:
    groups = series(found, name, "tokens")
    lines = []
    for shared, points in groups.items():
        lines += [f"**{shared}**", "", *ratio_table(points, "", tokens, (*PARTS, *STEPS))]
        lines += [*gains_table(points), *parts_table(points)]
    for shared, points in groups.items():
        if "training" in shared:
            count, contenders = points[-1]
            lines += [f"Memory of rank 0, {shared}, {tokens(count)}, MB:", ""]
            lines += memory_table(contenders)
    return lines


def layer_cost(found: Found) -> list[str]:
    rows, names = [], []
    for (name, case), contenders in found.items():
        if name == "layer_cost":
            params = dict(case)
            names = names or others([(0, contenders)], ("by hand",))
            gradient = "with gradient" if params["mode"] == "training" else "no gradient"
            by_hand = contenders["by hand"]["median"]
            own = seconds(contenders["tpkernels"]["components"]["own cost"])
            costs = [
                seconds(contenders[other]["median"] - by_hand) if other in contenders else ""
                for other in names
            ]
            label = f"{params['layer']}, TP={params['ranks']}, {gradient}"
            rows.append([label, seconds(by_hand), own, *costs])
    theirs = [f"{other}'s" for other in names]
    return table(["", "F.linear (and all-reduce)", "tpkernels' own cost", *theirs], rows)


def link(found: Found) -> list[str]:
    """Returns the table of bench_link.py, whose variants are gemm, all_reduce, serial and auto."""
    rows = []
    for (name, case), variants in found.items():
        if name == "link":
            of, info = dict(case), variants["auto"]
            median = {variant: record["median"] for variant, record in variants.items()}
            names = ("gemm", "all_reduce", "serial", "auto")
            share = hidden(info["hidden"], median["all_reduce"], median["auto"])
            row = [f"{of['rate']} Gbit/s, M={of['rows']:,}, {of['which']}"]
            row += [seconds(median[variant]) for variant in names]
            row += [number(1e3 * (median["auto"] - median["gemm"])), share]
            row += [
                f"{times(info[f'{better} against overlap=False'])}x" for better in ("auto", "ideal")
            ]
            rows.append(row)
    head = ["", "GEMM only", "all-reduce only", "overlap=False", 'overlap="auto"']
    return table([*head, "exposed ms", "hidden", "gain", "ideal gain"], rows)


def machine(heads: list[dict]) -> list[str]:
    """Returns the machine, the packages, the commit and the dates of the measurement."""
    info, commit = heads[-1]["machine_info"], heads[-1]["commit_info"]
    cpu = info["cpu"].get("brand_raw", info["processor"])
    cpu = f"{cpu}, {info['cpu'].get('count', '?')} cores, {info.get('capability', '')}"
    packages = [f"{name} {version}" for name, version in info.get("versions", {}).items()]
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    dates = sorted(head["datetime"][:10] for head in heads)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    where = ", ".join(info.get("gpus") or [cpu])
    text = f"{where}; Python {info['python_version']}; {', '.join(packages)}."
    return [f"{text} Commit {commit['id'][:12]}{changed}, {when}.", ""]


def sections(found: Found, heads: list[dict]) -> dict[str, list[str]]:
    """Returns the lines of each section that was measured, by name."""
    names = {name for name, _ in found}
    made = {"machine": machine(heads)}
    for name, write in (("all_reduce", all_reduce), ("layer_cost", layer_cost), ("link", link)):
        if name in names:
            made[name] = write(found)
    return made | {name: layer(found, name) for name in LAYERS if name in names}
