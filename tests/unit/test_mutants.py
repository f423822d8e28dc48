"""The tool of `make mutants-sampled` draws the same faults again and tells which tests notice."""

import pickle
import subprocess
import sys
import time

import pytest

from tools.mutants import run
from tools.mutants.draw import draw
from tools.mutants.mutant import ROOT, Mutant, copied_tree, read_sample, write_sample
from tools.mutants.reach import tests_of as in_order
from tools.mutants.run import examine

SOURCES = {
    "csrc/include/tpkernels/sum.cuh": """// a + b is no place for a fault
inline int sum(int a, int b, int c) {
  if (a < b && b <= 7) return a + b * c;
  return a - b;
}
""",
    "tpkernels/smaller.py": """def smaller(a: int | None, b: int) -> int:
    if a < b:
        return a
    return b
""",
    "tests/test_smaller.py": """import pytest
from tpkernels.smaller import smaller

def test_equal():
    assert smaller(1, 1) == 1

@pytest.mark.parametrize("b", [2, 1])
def test_different(b):
    assert smaller(3, b) == b
""",
    "pool.py": "class Pool:\n    _start = None\n",
}
TEST = "tests/test_smaller.py::test_"
REACH = {
    TEST + name: dict(seconds=seconds, lines={"tpkernels/smaller.py": lines})
    for name, seconds, lines in [
        ("equal", 0.3, [2, 4]),
        ("different[1]", 0.1, [2, 4]),
        ("different[2]", 0.2, [2, 4]),
        ("of_another_line", 0.1, [3]),
    ]
}


@pytest.fixture
def package(tmp_path):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


EXAMINE = """import pickle, sys
from tools.mutants.run import examine
pickle.dump(examine(*pickle.load(sys.stdin.buffer)), sys.stdout.buffer)
"""


def examined(*arguments):
    """Examine a mutant in a process that pytest does not run in yet."""
    ran = subprocess.run(
        [sys.executable, "-c", EXAMINE],
        input=pickle.dumps(arguments),
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
    )
    return pickle.loads(ran.stdout)


def fault(before, after, path="tpkernels/smaller.py"):
    line = SOURCES[path].split("\n").index(before) + 1
    return Mutant(path, line, "by hand", 0, before, after)


@pytest.mark.parametrize("python", [False, True], ids=["headers", "headers-and-python"])
def test_a_seed_stands_for_one_sample(package, python):
    if python:
        pytest.importorskip("cosmic_ray", reason="in the environment of `make mutants-sampled`")
    else:
        (package / "tpkernels/smaller.py").unlink()
    samples = [draw(seed, 3, package, lambda tree, mutant: True) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2] and len(samples[0]) == 3
    write_sample(package / "sample.csv", samples[0])
    assert read_sample(package / "sample.csv") == samples[0]
    every = draw(1, 1000, package, lambda tree, mutant: True)
    assert len({mutant.name for mutant in every}) == len(every) == (9 if python else 7)
    for mutant in every:
        source = SOURCES[mutant.path]
        changed = mutant.apply(source)
        assert changed != source and changed.split("\n")[0] == source.split("\n")[0]


def test_what_is_no_program_is_drawn_anew(package):
    (package / "tpkernels/smaller.py").unlink()
    sample = draw(1, 1000, package, lambda tree, mutant: "<" not in mutant.before)
    assert {mutant.line for mutant in sample} == {4}


def test_tests_are_those_of_the_line_and_the_cheapest_of_each_function_come_first():
    mutant, source = fault("    if a < b:", "    if a > b:"), SOURCES["tpkernels/smaller.py"]
    order = [TEST + name for name in ("different[1]", "equal", "different[2]")]
    assert in_order(mutant, source, REACH) == order
    before = mutant._replace(line=3)  # the source has lost a line since
    assert in_order(before, source, REACH) == order
    at_import = fault("def smaller(a: int | None, b: int) -> int:", "")
    assert len(in_order(at_import, source, REACH)) == 4


@pytest.mark.parametrize(
    ("mutant", "limit", "status", "noticed"),
    [
        (fault("    if a < b:", "    if a > b:"), 100, "killed", TEST + "different[1]"),
        (fault("    if a < b:", "    if a <= b:"), 100, "survived", ""),
        (fault("    return b", "    while True:\n        pass"), 4, "timeout", "a timeout"),
        (Mutant("tpkernels/smaller.py", 2, "by hand", 0, "    if a == b:", ""), 4, "gone", ""),
    ],
    ids=["noticed", "not noticed", "endless", "of another source"],
)
def test_status(package, mutant, limit, status, noticed):
    reach = {name: test for name, test in REACH.items() if "another" not in name}
    with copied_tree(package) as tree:
        found = examined(mutant, tree, reach, limit)
        assert (tree / mutant.path).read_text() == SOURCES[mutant.path]
    assert (found["status"], found["test"]) == (status, noticed)
    assert (package / mutant.path).read_text() == SOURCES[mutant.path]


@pytest.mark.parametrize(
    ("without_the_fault", "limit", "status"),
    [("", 100, "killed"), ("", 0.1, "timeout"), (None, 100, "timeout")],
    ids=["quick", "slow", "endless"],
)
def test_a_timeout_kills_where_the_tests_are_quick(
    package, monkeypatch, without_the_fault, limit, status
):
    answers = [None, without_the_fault]

    def pytest_for_50_ms(*_):
        time.sleep(0.05)
        return answers.pop(0)

    monkeypatch.setattr(run, "_pytest", pytest_for_50_ms)
    with copied_tree(package) as tree:
        assert examine(fault("    return b", ""), tree, REACH, limit)["status"] == status
    assert not answers
