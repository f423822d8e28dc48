"""The pages of the documentation and their code blocks.

A code block that cannot run here has a reason in the line above it:
`<!-- not run: needs a GPU -->`.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tools.line_links import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: ([^>]*?) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
NAMED_FILE = re.compile(
    r"(?:tpkernels|tpkernels_planner|csrc|tests|tools|examples|benchmarks|docs)/[\w./*-]*"
    r"|[\w./*-]+\.(?:py|cpp|h|cu|cuh)"
)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A code block of a page: its language, its text, and why it is not run, if it is not."""

    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(*match.group(2, 3, 1)) for match in BLOCK.finditer(page.read_text())]
