"""The pages: their code runs, their commands exist, their links and the files they name exist.

A code block that cannot run here has a reason in the line above it:
`<!-- not run: needs a GPU -->`. Python blocks of a page run one after the other in one namespace,
on two ranks (test_docs_code.py). Shell blocks are parsed; `tpkernels plan` is run. Blocks that show
a command's output (`$ tpkernels plan ...`) are held to it by test_planner_command.py.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import typer
from pages import BLOCK, PAGES, blocks, by_page
from typer.testing import CliRunner

from tools.line_links import LINK, ROOT, refreshed
from tpkernels.cli import app

SHELL = ("", "sh", "bash", "console")
COMMAND = re.compile(
    r"(?:\.venv/bin/)?(?:make|tpkernels|torchrun|python|pytest|pip|nsys|benchmarks/\S+) "
)
NAMED_FILE = re.compile(
    r"(?:tpkernels|tpkernels_planner|csrc|tests|tools|examples|benchmarks|docs)/[\w./*-]*"
    r"|[\w./*-]+\.(?:py|cpp|h|cu|cuh)"
)


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page, continued lines joined, without their comments."""
    lines = []
    for block in blocks(page):
        if block.language in SHELL and block.reason is None:
            lines += block.text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if COMMAND.match(line)]


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def check_tpkernels(arguments: list[str]) -> None:
    """Run `tpkernels plan ...`; of other commands parse the arguments."""
    if arguments[0] == "plan" and arguments[1] != "fit":
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
        return
    command = typer.main.get_command(app)
    with command.make_context("tpkernels", list(arguments)) as context:
        name, found, rest = command.resolve_command(context, arguments)
        found.make_context(name, list(rest), parent=context)


def check_files(words: list[str]) -> None:
    for word in words:
        if "/" in word and NAMED_FILE.fullmatch(word):  # train.py is the reader's
            assert (ROOT / word).exists(), f"{word} does not exist"


def check_command(command: str) -> None:
    program, *arguments = shlex.split(command.removeprefix(".venv/bin/"), comments=True)
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        assert set(targets) <= make_targets(), command
    elif program == "tpkernels":
        check_tpkernels(arguments)
    elif program == "python" and arguments[0] == "-c":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(arguments[1], {})
    else:
        if "tpkernels" in arguments:
            check_tpkernels(arguments[arguments.index("tpkernels") + 1 :])
        check_files([program, *arguments])


@by_page
def test_commands_are_right(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = '{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, '
    config += '"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}'
    Path("config.json").write_text(config)
    for command in commands(page):
        check_command(command)


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
