"""The lines of tpkernels that each test reaches: a JSON file a test file in build/mutants/reach."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .mutant import Mutant

KERNELS = "tests/kernels/"  # pytest runs them by Triton's interpreter, in a process of its own
DEVICE = "tests/proofs/device/test_device"  # compiles the CUDA headers
LEFT_OUT = (
    "tests/c10d/",
    "tests/gpu/",
    "tests/proofs/test_triton_interpreter.py",
    "tests/commands/test_demo.py",  # longer than a mutant may take
)
SETTINGS = """[run]
source = {tree}/tpkernels
parallel = true
data_file = {folder}/data
context = ${{MUTANTS_TEST-}}
disable_warnings = no-data-collected, module-not-imported, module-not-measured
"""


def environment(tree: Path, interpret: bool, **more: object) -> dict[str, str]:
    """Return the environment of a pytest that tests the tree."""
    # Two faults of one second would look alike to the bytecode's cache.
    wanted = dict(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE=1, OMP_NUM_THREADS=1, **more)
    if interpret:
        wanted["TRITON_INTERPRET"] = 1
    return {**os.environ, **{name: str(value) for name, value in wanted.items()}}


def build_device_code(tree: Path) -> None:
    """Build the CUDA headers for the simulation beforehand, as that is no test's time."""
    command = [sys.executable, "-c", "import device_build; device_build.library()"]
    subprocess.run(command, cwd=tree / "tests/proofs/device", check=True, timeout=300)


def digest(tree: Path, name: str) -> str:
    """Return a hash of a file, empty where there is none."""
    file = tree / name
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _in_functions(source: str) -> set[int]:
    """Return the lines that run when a function is called, not when its module is imported."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    bodies = [range(f.body[0].lineno, (f.end_lineno or 0) + 1) for f in functions]
    return set().union(*bodies)


def _record(name: str, tree: Path, folder: Path) -> dict:
    """Run a test file of the tree under coverage and return what its tests reach."""
    settings, seconds = folder / "settings", folder / "seconds.json"
    settings.write_text(SETTINGS.format(tree=tree, folder=folder))
    if name.startswith(DEVICE):
        build_device_code(tree)
    options = "-q", "-p", "tools.mutants.contexts", "-k", "not mutant"
    more = dict(COVERAGE_PROCESS_START=settings, MUTANTS_SECONDS=seconds)
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, name],
        cwd=tree,
        env=environment(tree, name.startswith(KERNELS), **more),
        stdout=subprocess.DEVNULL,
        timeout=1800,
    )
    passed = json.loads(seconds.read_text())
    coverage = importlib.import_module("coverage")
    tests = {test: dict(seconds=passed[test], lines={}) for test in passed}
    for file in folder.glob("data.*"):
        data = coverage.CoverageData(str(file))
        try:
            data.read()
        except coverage.exceptions.DataError:  # its rank was killed as it wrote
            continue
        for measured in map(Path, data.measured_files()):
            path = measured.relative_to(tree).as_posix()
            inside = _in_functions(measured.read_text())
            for line, contexts in data.contexts_by_lineno(str(measured)).items():
                for test in {context.split("|")[-1] for context in contexts} & set(tests):
                    if line in inside:
                        tests[test]["lines"].setdefault(path, []).append(line)
    paths = {name}.union(*(test["lines"] for test in tests.values()))
    return dict(digests={path: digest(tree, path) for path in sorted(paths)}, tests=tests)


def record(tree: Path, folder: Path, files: str = "tests/**/test_*.py") -> dict[str, dict]:
    """Return {test: its seconds and the lines that it reaches} of the tests that pass in the tree.

    A test file is run again where it, or a source that its tests reach, has changed.

    Args:
        tree: a copy of the sources.
        folder: keeps a record for each test file.
        files: the pattern of the test files.
    """
    found: dict[str, dict] = {}
    names = sorted(path.relative_to(tree).as_posix() for path in tree.glob(files))
    for name in [name for name in names if not name.startswith(LEFT_OUT)]:
        kept = folder / f"{name.replace('/', '.')}.json"
        old = json.loads(kept.read_text() if kept.exists() else '{"digests": {"no file": "?"}}')
        if any(digest(tree, path) != then for path, then in old["digests"].items()):
            (run := kept.with_suffix(".run")).mkdir(parents=True, exist_ok=True)
            old = _record(name, tree, run)
            kept.write_text(json.dumps(old))
            shutil.rmtree(run)
            print(f"{name}: {len(old['tests'])} tests", flush=True)
        found |= old["tests"]
    return found


def _statement(source: str, line: int) -> set[int]:
    """Return the lines of the innermost statement around a line; of a block, of its head alone."""
    found = {line}
    for node in ast.walk(ast.parse(source)):  # an inner one comes after the outer
        if isinstance(node, ast.stmt):
            body, end = getattr(node, "body", None), node.end_lineno or 0
            head = range(node.lineno, max(body[0].lineno, node.lineno + 1) if body else end + 1)
            found = set(head) if line in head else found
    return found


def tests_of(mutant: Mutant, source: str, reach: dict[str, dict]) -> list[str]:
    """Return the tests that reach the fault, the cheapest and most specific first.

    A fault outside of functions acts at import: the tests are those that reach its file.
    """
    if not mutant.path.endswith(".py"):
        return sorted((t for t in reach if t.startswith(DEVICE)), key=lambda t: reach[t]["seconds"])
    statement = _statement(source, mutant.place(source) or mutant.line)
    in_file = {t: lines for t in reach if (lines := reach[t]["lines"].get(mutant.path))}
    hit = [t for t, lines in in_file.items() if statement & set(lines)] or list(in_file)

    def cost(test: str) -> float:
        return reach[test]["seconds"] * sum(map(len, reach[test]["lines"].values()))

    turns: dict[str, int] = {}
    order = []
    for test in sorted(hit, key=cost):  # the cheapest case of each function, then the second, ...
        function = test.partition("[")[0]
        turns[function] = turns.get(function, 0) + 1
        order.append((turns[function], len(order), test))
    return [test for _, _, test in sorted(order)]
