"""A mutant, a source with one small fault, and the temporary tree that holds it."""

from __future__ import annotations

import contextlib
import csv
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """One fault: the lines `before` are replaced by the lines `after`.

    Attributes:
        path: of the source, from the root.
        line: the first line that changes, from 1.
        operator: the kind of fault.
        occurrence: counts the places in the source where the operator fits.
    """

    path: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str

    @property
    def name(self) -> str:
        """The mutant's key in records and in the list of equivalents."""
        return f"{self.path}:{self.line}:{self.operator}:{self.occurrence}"

    def place(self, source: str) -> int | None:
        """Return the first of the lines `before` in the source, from 1; None if they are gone.

        Lines that have moved are found: the nearest that are the same.
        """
        lines, before = source.split("\n"), self.before.split("\n")
        starts = range(len(lines) - len(before) + 1)
        found = [start + 1 for start in starts if lines[start : start + len(before)] == before]
        return min(found, key=lambda line: abs(line - self.line), default=None)

    def apply(self, source: str) -> str | None:
        """Return the source with the fault, or None where the lines are no longer in it."""
        line = self.place(source)
        if line is None:
            return None
        lines = source.split("\n")
        last = line - 1 + len(self.before.split("\n"))
        lines[line - 1 : last] = self.after.split("\n") if self.after else []
        return "\n".join(lines)

    @contextlib.contextmanager
    def planted(self, tree: Path) -> Iterator[bool]:
        """Plant the fault in a copy of the tree for a while; yield False where it has no place."""
        file = tree / self.path
        source = file.read_text()
        changed = self.apply(source)
        file.write_text(source if changed is None else changed)
        try:
            yield changed is not None
        finally:
            file.write_text(source)


def mutant_of(path: str, operator: str, occurrence: int, source: str, changed: str) -> Mutant:
    """Return the mutant that makes `changed` of `source`: the lines in which they differ."""
    old, new = source.split("\n"), changed.split("\n")
    first, last = 0, 0
    shorter = min(len(old), len(new))
    while first < shorter and old[first] == new[first]:
        first += 1
    while last < shorter - first and old[-1 - last] == new[-1 - last]:
        last += 1
    before, after = ("\n".join(lines[first : len(lines) - last]) for lines in (old, new))
    return Mutant(path, first + 1, operator, occurrence, before, after)


def read_sample(file: Path) -> list[Mutant]:
    """Return the mutants of a checked-in sample."""
    with file.open(newline="") as rows:
        return [
            Mutant(path, int(line), operator, int(occurrence), before, after)
            for path, line, operator, occurrence, before, after in [*csv.reader(rows)][1:]
        ]


def write_sample(file: Path, sample: list[Mutant]) -> None:
    """Write the mutants as rows of a CSV file."""
    with file.open("w", newline="") as rows:
        csv.writer(rows, lineterminator="\n").writerows([Mutant._fields, *sample])


@contextlib.contextmanager
def copied_tree(root: Path = ROOT) -> Iterator[Path]:
    """Copy the sources and what is built of them to a temporary folder.

    Faults are planted there, so that a run that is killed leaves the working tree as it was.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=root, text=True).split("\n")
    built = [*root.glob("tpkernels/*.so"), *root.glob("build/device/*.o")]
    with tempfile.TemporaryDirectory(prefix="tpkernels-mutants-") as folder:
        for file in [*map(root.joinpath, filter(None, names)), *built]:
            copy = Path(folder) / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                shutil.copy2(file, copy)
        yield Path(folder)
