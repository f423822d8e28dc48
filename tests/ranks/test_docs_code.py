"""The Python blocks of each page run one after the other in one namespace, on two ranks."""

import contextlib
import io
from pathlib import Path

from pages import blocks, by_page


def python_of(page: Path) -> list[str]:
    return [b.text for b in blocks(page) if b.language == "python" and b.reason is None]


def run_blocks(name: str, codes: list[str]) -> None:
    """Run a page's Python blocks as a rank of the job."""
    namespace: dict = {"__name__": name}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, code in enumerate(codes, 1):
            exec(compile(code, f"{name}, Python block {number}", "exec"), namespace)


@by_page
def test_python_runs_on_two_ranks(pool, page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")
    if codes := python_of(page):
        pool.run(2, run_blocks, page.name, codes)
