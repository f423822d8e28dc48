"""Draws mutants: `python -m tools.mutants.draw SEED` writes the sample that a seed stands for.

cosmic-ray's operators change the Python sources, and text replacements what they do not fit: the
CUDA headers, and the casts and strides of Triton kernels. A draw takes a place, then one of the
faults that fit there, so that a kind of fault with many variants weighs no more than another.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .mutant import ROOT, Mutant, copied_tree, mutant_of, write_sample

SIZE = 300
HEADERS = "csrc/include/tpkernels"
SWAPS = {"+": "-", "*": "+", "/": "*", "%": "/", "<": "<=", "==": "!=", "&&": "||"}
BACK = {"-": "+", "<=": "<", "!=": "==", "||": "&&"}
HEADER_TEXT = {  # operator -> (pattern, replacements)
    **{
        f"swap {old}": (rf" {re.escape(old)} ", [f" {new} "]) for old, new in (SWAPS | BACK).items()
    },
    "constant": (r"(?<![\w.])[1-9]\d*(?![\w.])", [r"(\g<0> + 1)", r"(\g<0> - 1)"]),
    "drop": (r"(?m)^ +[^\n;/]*\);$", [""]),
}
KERNEL_TEXT = {
    "narrow": (r"\.to\(tl\.int64\)", [""]),
    "narrow_cast": (r"tl\.cast\((\w+), tl\.int64\)", [r"\1"]),
    "stride": (r"\* \w+_stride\b", ["* N"]),
    "all_rows": (r"\(row < M\)(\[:, None\])? & ", [""]),
}
Place = list[tuple[str, int, Callable[[], str]]]  # faults: operator, occurrence, changed source


def text_places(source: str, operators: dict) -> Iterator[Place]:
    """Yield the places where text replacements fit, outside of comments and of the preprocessor."""
    plain = re.sub(r"//[^\n]*|^#[^\n]*", lambda m: " " * len(m[0]), source, flags=re.M)
    for operator, (pattern, replacements) in operators.items():
        for number, match in enumerate(re.finditer(pattern, plain)):
            before, after = source[: match.start()], source[match.end() :]
            changed = [before + match.expand(new) + after for new in replacements]
            first = number * len(changed)
            yield [
                (operator, first + i, functools.partial(str, text))
                for i, text in enumerate(changed)
            ]


def _skipped(tree: ast.AST) -> Iterator[tuple[tuple, tuple]]:
    """Yield where annotations, type-only blocks and `__all__` stand: there a fault is nothing."""
    for node in ast.walk(tree):
        part = getattr(node, "annotation", None) or getattr(node, "returns", None)
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if type_only or (isinstance(node, ast.Assign) and ast.unparse(node)[:7] == "__all__"):
            part = node
        if isinstance(part, (ast.expr, ast.stmt)):
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def python_places(source: str) -> Iterator[Place]:
    """Yield the places where cosmic-ray's operators fit."""
    library = {name: importlib.import_module(f"cosmic_ray.{name}") for name in ("ast", "mutating")}
    provider = importlib.import_module("cosmic_ray.operators.provider").OperatorProvider()
    skipped = list(_skipped(ast.parse(source)))
    nodes = list(library["ast"].ast_nodes(library["ast"].get_ast(source)))
    places: dict[tuple, Place] = {}
    for name in provider:
        if name.startswith("Variable"):  # they need the names of variables
            continue
        operator = provider[name]()
        found = [begin for node in nodes for begin, _ in operator.mutation_positions(node)]
        for number, at in enumerate(found):
            change = functools.partial(library["mutating"].mutate_code, source, operator, number)
            if not any(start <= at < end for start, end in skipped):
                places.setdefault((at, name.split("_")[0]), []).append((name, number, change))
    yield from (places[key] for key in sorted(places))


def all_places(root: Path) -> Iterator[tuple[str, str, Place]]:
    """Yield path, source and faults of every place in tpkernels/ and in the CUDA headers."""
    for file in sorted([*root.glob("tpkernels/**/*.py"), *root.glob(f"{HEADERS}/*.cuh")]):
        path, source = file.relative_to(root).as_posix(), file.read_text()
        if file.suffix == ".py":
            yield from ((path, source, place) for place in python_places(source))
        if path.startswith((HEADERS, "tpkernels/kernels/")):
            operators = HEADER_TEXT if path.startswith(HEADERS) else KERNEL_TEXT
            yield from ((path, source, place) for place in text_places(source, operators))


def _imports(tree: Path, path: str) -> bool:
    """Return True if a child of this process can import the tree's module."""
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
            os.dup2(nothing.fileno(), sys.stderr.fileno())
            sys.path.insert(0, str(tree))
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _object_code(tree: Path) -> bytes:
    """Return what the device code compiles to for the simulation; nothing where it does not."""
    sys.path.append(str(ROOT / "tests/proofs/device"))
    build, out = importlib.import_module("device_build"), tree / "harness.o"
    options = "-c", "-g0", "-DTEST_RANKS=3", "-DTEST_TYPES=float, __nv_bfloat16"
    with contextlib.suppress(RuntimeError):
        build.compile(out, [build.HERE / "harness.cpp"], None, *options, headers=tree / HEADERS)
        return out.read_bytes()
    return b""


def _is_a_program(tree: Path, mutant: Mutant) -> bool:
    """Return True if the mutant can be imported, or compiles to other code than its source."""
    if mutant.path.endswith(".py"):
        with mutant.planted(tree):
            return _imports(tree, mutant.path)
    plain = _object_code(tree)
    with mutant.planted(tree):
        return _object_code(tree) not in (b"", plain)


def draw(
    seed: int, size: int, root: Path, is_a_program: Callable[[Path, Mutant], bool] = _is_a_program
) -> list[Mutant]:
    """Return the sample of a seed, which depends on the sources alone.

    Args:
        seed: of the draw.
        size: the number of mutants; fewer where there are fewer places.
        root: the folder of the sources.
        is_a_program: called with a copy of the tree and a mutant. Another is drawn instead of one
            for which it returns False.
    """
    places, dice, sample = list(all_places(root)), random.Random(seed), []
    dice.shuffle(places)
    with copied_tree(root) as tree:
        while places and len(sample) < size:
            path, source, faults = places.pop()
            operator, occurrence, change = dice.choice(faults)
            mutant = mutant_of(path, operator, occurrence, source, change())
            if is_a_program(tree, mutant):
                sample.append(mutant)
    return sorted(sample, key=lambda mutant: (mutant.path, mutant.line, mutant.name))


def main() -> None:
    """Draw the sample of the seed that is the argument."""
    seed = int(sys.argv[1])
    sys.dont_write_bytecode = True  # two faults of one second look alike to the bytecode's cache
    for module in ("torch", "triton", "typer", "rich"):  # imported once, not by every child
        importlib.import_module(module)
    write_sample(Path(__file__).with_name(f"sample-{seed}.csv"), draw(seed, SIZE, ROOT))


if __name__ == "__main__":
    main()
