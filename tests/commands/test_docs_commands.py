"""The commands that pages show exist, take their arguments, and run where they are quick."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import typer
from pages import NAMED_FILE, blocks, by_page
from typer.testing import CliRunner

from tools.line_links import ROOT
from tpkernels.cli import app

SHELL = ("", "sh", "bash", "console")
COMMAND = re.compile(
    r"(?:\.venv/bin/)?(?:make|tpkernels|torchrun|python|pytest|pip|nsys|benchmarks/\S+) "
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
