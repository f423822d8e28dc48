"""The examples, on ranks, held to what they print."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

from tools.line_links import ROOT

EXAMPLES = ROOT / "examples"


def run_example(name: str) -> str:
    """Run an example as a rank of the job; return what it printed."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def printed_by_rank_0(pool, ranks: int, name: str) -> str:
    first, *others = pool.run(ranks, run_example, name)
    assert not any(others), f"{name}: another rank than the first prints"
    return first


def losses(text: str) -> list[tuple[float, float]]:
    """Return (sharded, unsharded) loss of each step that an example printed."""
    found = re.findall(r"sharded (\d+\.\d+),?  ?unsharded (\d+\.\d+)", text)
    return [(float(sharded), float(unsharded)) for sharded, unsharded in found]


def assert_same_losses(text: str, count: int):
    pairs = losses(text)
    assert len(pairs) == count, text
    assert all(abs(a - b) <= 1e-4 * b for a, b in pairs), text
    return pairs


def difference(text: str) -> float:
    return float(re.search(r"largest difference of a \w+: (\S+)", text)[1])


def test_every_example_is_tested_here():
    tested = set(re.findall(r'printed_by_rank_0\(pool, \d, "(\w+)"\)', Path(__file__).read_text()))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_to_start_them(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert f"examples/{path.name}" in text.split('"""')[1]


def test_own_model(pool):
    pairs = assert_same_losses(printed_by_rank_0(pool, 2, "own_model"), 20)
    assert pairs[-1][0] < 0.8 * pairs[0][0]


def test_layers(pool):
    text = printed_by_rank_0(pool, 2, "layers")
    assert "up (125, 64), down (64, 125)" in text
    assert text.count("equal to the bit: True") == 2
    assert text.count("all_reduce row_forward") == 3 and "chunk 3 of 3" in text
    assert text.count("all_reduce column_backward") == 1
    assert "overlap=3 was asked for" in text


def test_huggingface(pool):
    text = printed_by_rank_0(pool, 2, "huggingface")
    pairs = assert_same_losses(text, 5)
    assert pairs[-1][0] < pairs[0][0]
    assert "the same without sharding: True" in text
    assert "state names as in the stock model: True" in text


def test_fsdp2(pool):
    text = printed_by_rank_0(pool, 4, "fsdp2")
    assert_same_losses(text, 5)
    assert difference(text) < 1e-5


def test_loss(pool):
    text = printed_by_rank_0(pool, 2, "loss")
    assert_same_losses(text, 1)
    assert difference(text) < 1e-5


def test_tune(pool):
    text = printed_by_rank_0(pool, 2, "tune")
    before, measured, after = text.split("\n\n")
    assert (
        before.startswith("before: RowParallelLinear(1024, 256") and "schedule: 1 chunk" in before
    )
    assert measured.startswith("measured: ")
    assert "after: RowParallelLinear(1024, 256" in after and "measured: " in after
