"""Draws docs/images/*.svg and writes the tables of docs/performance.md, between its markers, from the benchmarks' JSON files.

`python benchmarks/plot.py [FILE...]`: without files the newest that `make bench` saved, and the newest of bench_link.py if there is one.
Of several files the later one's figures of a case count. Only what was measured is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tools.doc_sections import fill  # noqa: E402
from tpkernels_planner.files import write_atomically  # noqa: E402

PARTS = (
    "GEMM",
    "all-reduce",
    "tpkernels, overlap=False",
    "tpkernels, 4 chunks",
    "tpkernels, async",
)
LAYERS = {
    "row_linear": "row-parallel layer",
    "column_linear": "column-parallel layer",
    "mlp": "MLP",
    "block": "block",
}
COLOURS = {
    "tpkernels": "black",
    "torch": "tab:blue",
    "torch.compile": "tab:cyan",
    "DTensor": "tab:orange",
    "megatron-core": "tab:green",
    "fairscale": "tab:purple",
    "vLLM": "tab:red",
    "DeepSpeed": "tab:brown",
    "OpenMPI": "tab:pink",
    "one process": "tab:gray",
}


def load(files: list[Path]) -> tuple[dict, list[dict]]:
    """({(name, case): {contender: record}}, the files' heads); a case is its parameters as sorted pairs."""
    found: dict = {}
    heads = []
    for file in files:
        data = json.loads(file.read_text())
        heads.append({key: data[key] for key in ("machine_info", "commit_info", "datetime")})
        for record in data["benchmarks"]:
            info = record["extra_info"]
            if record["name"].startswith("test_link"):
                case = dict(record["params"])
                variant = case.pop("variant")
                found.setdefault(("link", tuple(case.items())), {})[variant] = {
                    **info,
                    "median": record["stats"]["median"],
                }
            elif "params" in info:
                case = found.setdefault((info["name"], tuple(info["params"].items())), {})
                case[info.get("contender", "tpkernels")] = {
                    **info,
                    "median": record["stats"]["median"],
                }
    return found, heads


def newest() -> list[Path]:
    saved = sorted(ROOT.glob(".benchmarks/*/*.json"), key=lambda path: path.stat().st_mtime)
    links = [path for path in saved if '"test_link' in path.read_text()]
    return [*[path for path in saved if path not in links][-1:], *links[-1:]]


def series(found: dict, name: str, axis: str) -> dict[str, list[tuple[int, dict]]]:
    """The cases of a question that differ in `axis` only: {what they share: [(value on the axis, contenders)]}."""
    lines: dict[str, list] = {}
    for (question, case), contenders in found.items():
        if question == name and axis in dict(case):
            shared = {key: value for key, value in case if key != axis}
            words = [
                f"{value} {key}" if isinstance(value, int) else value
                for key, value in shared.items()
            ]
            lines.setdefault(", ".join(words), []).append((dict(case)[axis], contenders))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in lines.items()}


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(value) * scale >= 1 or unit == "µs":
            return (
                f"{value * scale:.3g} {unit}"
                if abs(value * scale) < 1000
                else f"{value * scale:.0f} {unit}"
            )
    raise AssertionError


def times(ratio: dict | None) -> str:
    if not ratio:
        return ""
    median, low, high = (
        f"{ratio[key]:.2f}" if 0.1 <= ratio[key] < 10 else f"{ratio[key]:.2g}"
        for key in ("median", "p10", "p90")
    )
    return f"{median} ({low}-{high})"


def size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"


def tokens(count: int) -> str:
    return f"{count} token{'s' * (count > 1)}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def in_order(points: list[tuple[int, dict]], skip=()) -> list[str]:
    """The contenders of any of the points but tpkernels, as the suite lists them."""
    names = dict.fromkeys(
        name for _, contenders in points for name in contenders["tpkernels"].get("ratios", {})
    )
    return [name for name in names if name not in skip]


def ratio_table(points, axis: str, words, skip=()) -> list[str]:
    others = in_order(points, skip)
    rows = []
    for value, contenders in points:
        ours = contenders["tpkernels"]
        rows.append(
            [
                words(value),
                seconds(ours["components"].get("overlapped", ours["median"])),
                *(times(ours["ratios"].get(name)) for name in others),
            ]
        )
    return table([axis, "tpkernels", *others], rows)


def all_reduce(found: dict) -> list[str]:
    lines = []
    for shared, points in series(found, "all_reduce", "bytes").items():
        lines += [f"**{shared}**", "", *ratio_table(points, "bytes", size)]
    return lines


def layer(found: dict, name: str) -> list[str]:
    lines, memory = [], {}
    parts = ("GEMM", "all-reduce", "serial", "overlapped", "ideal")
    for shared, points in series(found, name, "tokens").items():
        lines += [f"**{shared}**", "", *ratio_table(points, "", tokens, PARTS)]
        rows = []
        for count, contenders in points:
            of, ratios = contenders["tpkernels"]["components"], contenders["tpkernels"]["ratios"]
            share = f"{100 * of['hidden']:.0f}%" if "hidden" in of else ""
            compared = (
                times(ratios.get(f"tpkernels, {other}")) for other in ("overlap=False", "4 chunks")
            )
            rows.append(
                [
                    tokens(count),
                    *(seconds(of[part]) if part in of else "" for part in parts),
                    share,
                    *compared,
                ]
            )
        head = [
            "",
            "GEMM only",
            "all-reduce only",
            "serial",
            "overlapped",
            "ideal: max",
            "hidden",
            "serial / overlapped",
            "4 chunks / overlapped",
        ]
        lines += (
            table(head, rows)
            if any(row[-1] for row in rows)
            else table(head[:-1], [row[:-1] for row in rows])
        )
        memory[shared] = points[-1]
    for shared, (count, contenders) in memory.items():
        if "training" in shared:
            rows = [
                [
                    contender,
                    *(
                        f"{record['memory'].get(kind, 0) / 2**20:.1f}"
                        if kind in record["memory"]
                        else ""
                        for kind in ("parameters", "resident", "peak of a call")
                    ),
                ]
                for contender, record in contenders.items()
                if contender not in PARTS
            ]
            lines += [f"Memory of rank 0, {shared}, {count} tokens, MB:", ""]
            lines += table(
                [
                    "",
                    "parameters",
                    "resident after the first call",
                    "more at a training step's peak",
                ],
                rows,
            )
    return lines


def layer_cost(found: dict) -> list[str]:
    rows, others = [], []
    for (name, case), contenders in found.items():
        if name == "layer_cost":
            ours, params = contenders["tpkernels"], dict(case)
            others = others or in_order([(0, contenders)], ("by hand",))
            what = f"{params['layer']}, TP={params['ranks']}, {'with' if params['mode'] == 'training' else 'no'} gradient"
            by_hand = contenders["by hand"]["median"]
            costs = [
                f"{seconds(contenders[other]['median'] - by_hand)}" if other in contenders else ""
                for other in others
            ]
            rows.append([what, seconds(by_hand), seconds(ours["components"]["own cost"]), *costs])
    return table(
        [
            "",
            "F.linear (and all-reduce)",
            "tpkernels' own cost",
            *(f"{other}'s" for other in others),
        ],
        rows,
    )


def link(found: dict) -> list[str]:
    """bench_link.py's cases, whose variants are gemm, all_reduce, serial and auto."""
    rows = []
    for (name, case), variants in found.items():
        if name == "link" and variants.keys() >= {"gemm", "all_reduce", "serial", "auto"}:
            of, info = dict(case), variants["auto"]
            medians = [
                seconds(variants[variant]["median"])
                for variant in ("gemm", "all_reduce", "serial", "auto")
            ]
            gain, ideal = info["auto against overlap=False"], info["ideal against overlap=False"]
            what = f"{of['rate']} Gbit/s, M={of['rows']}, {of['which']}"
            rows.append(
                [what, *medians, f"{gain:.2f}", f"{ideal:.2f}", f"{100 * info['hidden']:.0f}%"]
            )
    head = [
        "",
        "GEMM only",
        "all-reduce only",
        "overlap=False",
        'overlap="auto"',
        "gain",
        "ideal gain",
        "hidden",
    ]
    return table(head, rows)


def machine(heads: list[dict]) -> list[str]:
    last = heads[-1]
    info, commit = last["machine_info"], last["commit_info"]
    where = info.get("gpus") or [
        f"{info['cpu'].get('brand_raw', info['processor'])}, {info['cpu'].get('count', '?')} cores, {info.get('capability', '')}"
    ]
    packages = ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    dates = sorted(head["datetime"][:10] for head in heads)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        f"{', '.join(where)}; Python {info['python_version']}; {packages}. Commit {commit['id'][:12]}{changed}, {when}.",
        "",
    ]


def tables(found: dict, heads: list[dict]) -> dict[str, list[str]]:
    names = {name for name, _ in found}
    made = {"machine": machine(heads)}
    for name, write in (("all_reduce", all_reduce), ("layer_cost", layer_cost), ("link", link)):
        if name in names:
            made[name] = write(found)
    return made | {name: layer(found, name) for name in LAYERS if name in names}


def draw(found: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "tpkernels",
            "font.size": 8,
            "legend.frameon": False,
        }
    )
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)

    def grid(name: str, axis: str, label: str, y_label: str, lines, y_scale: str = "log") -> None:
        """`lines(points)`: {label: (xs, ys, style)} of a panel; a panel for each of what `series` gives."""
        panels = series(found, name, axis)
        if not panels:
            return
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False
        )
        handles: dict = {}
        for panel, (shared, points) in zip(axes.flat, panels.items(), strict=False):
            for line, (xs, ys, style) in lines(points).items():
                handles.setdefault(line, panel.plot(xs, ys, markersize=3, **style)[0])
            values = [value for value, _ in points]
            panel.set(xscale="log", yscale=y_scale, title=shared, xlabel=label, ylabel=y_label)
            panel.set_xticks(
                values, [size(value) if axis == "bytes" else str(value) for value in values]
            )
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        for panel in axes.flat[len(panels) :]:
            panel.remove()
        legend_rows = -(-len(handles) // (4 * columns))
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="lower center",
            ncols=-(-len(handles) // legend_rows),
        )
        figure.tight_layout(rect=(0, (0.18 * legend_rows + 0.05) / (3.1 * rows), 1, 1))
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)

    def style(name: str) -> dict:
        return dict(
            color=COLOURS.get(name, "tab:olive"),
            marker="o",
            linewidth=2.0 if name == "tpkernels" else 1.0,
        )

    def by_contender(points, value, skip) -> dict:
        names = dict.fromkeys(
            name for _, contenders in points for name in contenders if name not in skip
        )
        chosen = {
            name: [(x, value(contenders, name)) for x, contenders in points if name in contenders]
            for name in names
        }
        return {name: (*zip(*line, strict=True), style(name)) for name, line in chosen.items()}

    def microseconds(contenders, name):
        return 1e6 * contenders[name]["median"]

    def ratio(contenders, name):
        return contenders["tpkernels"]["ratios"][name]["median"] if name != "tpkernels" else 1.0

    def parts(points) -> dict:
        made = {}
        looks = {
            "GEMM": ("tab:blue", "-"),
            "all-reduce": ("tab:red", "-"),
            "serial": ("tab:gray", "-"),
            "overlapped": ("black", "-"),
            "ideal": ("tab:green", "--"),
        }
        for part, (colour, dash) in looks.items():
            line = [
                (x, 1e3 * c["tpkernels"]["components"][part])
                for x, c in points
                if part in c["tpkernels"]["components"]
            ]
            if line:
                made["ideal: max(GEMM, all-reduce)" if part == "ideal" else part] = (
                    *zip(*line, strict=True),
                    dict(color=colour, linestyle=dash, marker="o"),
                )
        return made

    grid(
        "all_reduce",
        "bytes",
        "message",
        "time (µs)",
        lambda points: by_contender(points, microseconds, PARTS),
    )
    for name in ("mlp", "block"):
        grid(
            name,
            "tokens",
            "tokens",
            "time / tpkernels' time",
            lambda points: by_contender(points, ratio, PARTS),
            "linear",
        )
    for name in ("row_linear", "column_linear"):
        grid(name, "tokens", "tokens", "time (ms)", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument(
        "--tables-only", action="store_true", help="no pictures, which need matplotlib"
    )
    options = parser.parse_args()
    files = options.files or newest()
    if not files:
        parser.error("no results in .benchmarks: run `make bench` first, or name its JSON files")
    found, heads = load(files)
    found = {
        key: contenders
        for key, contenders in found.items()
        if key[0] == "link" or "tpkernels" in contenders
    }  # the ratios' base
    write_atomically(options.page, fill(options.page.read_text(), tables(found, heads)))
    if not options.tables_only:
        draw(found, options.page.parent / "images")


if __name__ == "__main__":
    main()
