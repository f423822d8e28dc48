"""Line numbers of the links in docs/*.md: `python tools/line_links.py` brings them up to date.

A link names what its line contains: [`ParallelLinear.weight_and_bias`](../tpkernels/nn/x.py#L12).
In a Python file a name is the definition's, dotted for a method. Anything else is text: the line
that defines it (in C++ from the first column on), or the only line that contains it.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([^`]+)`\]\(([^)#\s]+)#L(\d+)\)")


def _python_line(source: str, name: str) -> int | None:
    """Return the line of the definition with this dotted name, or None."""
    line = None
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return None
        line, body = found[-1].lineno, found[-1].body
    return line


def find_line(path: Path, text: str) -> int:
    """Return the number of the line that a link's text names.

    Args:
        path: of the source file.
        text: a dotted Python name, or a piece of the line.

    Raises:
        ValueError: no line fits, or several do.
    """
    source = path.read_text()
    if path.suffix == ".py" and (line := _python_line(source, text)) is not None:
        return line
    lines = list(enumerate(source.splitlines(), 1))
    found = [number for number, line in lines if text in line]
    defining = [n for n in found if re.match(rf"[A-Za-z].*\b{re.escape(text)}\(", lines[n - 1][1])]
    candidates = defining or found
    if len(candidates) != 1:
        raise ValueError(f"{path}: {len(candidates)} lines fit `{text}`, of which one is wanted")
    return candidates[0]


def refreshed(page: Path) -> str:
    """Return a page with the line number of every link brought up to date.

    Raises:
        ValueError: as `find_line`.
        OSError: a link's file does not exist.
    """

    def with_line(link: re.Match) -> str:
        line = find_line(page.parent / link[2], link[1])
        return f"[`{link[1]}`]({link[2]}#L{line})"

    return LINK.sub(with_line, page.read_text())


def main() -> None:
    """Refresh the pages that are named, or all of docs/."""
    for page in [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "docs").glob("*.md")):
        page.write_text(refreshed(page))


if __name__ == "__main__":
    main()
