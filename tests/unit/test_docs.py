"""The pages: their links and the files that they name exist.

test_docs_code.py runs their Python blocks, test_docs_commands.py checks their commands, and
test_planner_command.py holds `$ tpkernels plan ...` to the output that a page shows.
"""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

from pages import BLOCK, NAMED_FILE, PAGES, by_page

from tools.line_links import LINK, ROOT, refreshed


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


@cache
def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split()
    return [f"/{name}" for name in names if (ROOT / name).exists()]


def exists(name: str) -> bool:
    """Return True if a page may write `name`: a file's path, its end, a folder or a pattern."""
    if "*" in name:
        return any(ROOT.glob(name))
    return (ROOT / name).exists() or any(path.endswith(f"/{name}") for path in tracked())


@by_page
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`([^`\s]+)`", prose(page))
    missing = [name for name in named if NAMED_FILE.fullmatch(name) and not exists(name)]
    assert not missing


def test_contributing_names_functions_of_their_files():
    named = re.findall(r"`([\w/.]+)`, `(\w+)`", PAGES[1].read_text())
    assert len(named) >= 8
    assert not [pair for pair in named if f"{pair[1]}(" not in (ROOT / pair[0]).read_text()]


@by_page
def test_headings_open_with_a_subject_or_ask(page):
    openers = r"^#+ (?:What|Of|As|Whether|For|From|Where|Who)\b.*(?<!\?)$"
    assert not re.findall(openers, prose(page), re.M)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@by_page
def test_links_lead_to_files_and_headings(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if "://" in link:
            continue
        target = (page.parent / link) if link else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}#{anchor}"


@by_page
def test_links_to_lines_are_right(page):
    assert refreshed(page) == page.read_text(), "run `python tools/line_links.py`, or `make format`"


def test_walkthrough_is_short():
    links = LINK.findall((ROOT / "docs" / "walkthrough.md").read_text())
    assert len(links) >= 10
    assert len({path for _, path, _ in links if "tests/" not in path}) <= 8


def test_every_page_is_on_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = {os.path.basename(page) for page in PAGES[2:]}
    assert pages == set(re.findall(r": ([\w-]+\.md)$", nav, re.M))
