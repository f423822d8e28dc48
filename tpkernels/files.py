"""Files that are never half-written, pages with made sections, and where the user's cache is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed at the end: whoever reads `path` sees all of it, or what was there before."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def fill(text: str, made: dict[str, list[str]]) -> str:
    """A page's text with the lines made for each section, from `<!-- name -->` to `<!-- /name -->`."""
    for name, lines in made.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = block.sub(
            lambda match, lines=lines: match[1] + "\n" + "\n".join(lines) + match[2], text
        )
    return text


def cache_folder() -> Path:
    """Where what was measured on this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpkernels"
