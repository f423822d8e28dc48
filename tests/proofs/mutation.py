"""Edits of C++ source by markers, so that reformatting the source or renaming its locals breaks no
mutant.

A marker is a comment at the end of a statement's last line: `pending[i].wait();  //
mutant:row.wait`. An edit names markers and never repeats the source: what it inserts is derived by
a regular expression from a marked statement. Statements keep their markers, so that several edits
of one mutant can name the same marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """A change of a source text that has all of `markers`."""

    markers: frozenset[str]
    apply: Callable[[str], str]


OPAQUE = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"')  # comments and strings


def markers(source: str) -> set[str]:
    """Every marker in `source`."""
    return set(re.findall(r"// mutant:([\w.]+)$", source, flags=re.M))


def _statement(source: str, marker: str) -> tuple[int, int, int]:
    """(start, end, end of line) of the statement that `marker` ends."""
    found = list(re.finditer(rf"[ \t]*// mutant:{re.escape(marker)}$", source, flags=re.M))
    assert len(found) == 1, f"{len(found)} markers 'mutant:{marker}' in the source, not one"
    plain = OPAQUE.sub(lambda match: " " * len(match[0]), source)
    end = found[0].start()
    terminator = re.search(r"(\{\}|[;{])$", plain[:end])
    assert terminator, f"mutant:{marker} does not end a statement"
    start, depth, closed = terminator.start(), 0, False
    while start > 0:
        character = plain[start - 1]
        if depth == 0 and (character in ";{" or (character == "}" and closed)):
            break
        depth += (character in ")]}") - (character in "([{")
        closed = closed or not character.isspace()
        start -= 1
    start += len(plain[start:end]) - len(plain[start:end].lstrip())
    return start, end, found[0].end()


def _derive(statement: str, pattern: str, text: str) -> str:
    """`statement` on one line, with the one match of `pattern` replaced."""
    line = re.sub(r"\s*\n\s*", " ", statement)
    derived, count = re.subn(pattern, text, line)
    assert count == 1, f"{count} matches of {pattern!r} in {line!r}, not one"
    return derived


def replace(marker: str, pattern: str, text: str) -> Edit:
    """Replaces the one match of `pattern` within the marked statement."""

    def edit(source: str) -> str:
        start, end, _ = _statement(source, marker)
        return source[:start] + _derive(source[start:end], pattern, text) + source[end:]

    return Edit(frozenset({marker}), edit)


def delete(marker: str) -> Edit:
    """Deletes the marked statement; its marker goes too."""

    def edit(source: str) -> str:
        start, _, line_end = _statement(source, marker)
        return source[:start] + source[line_end:]

    return Edit(frozenset({marker}), edit)


def insert(text: str, *, before: str = "", after: str = "") -> Edit:
    """Inserts a line of text before or after the marked statement."""
    assert bool(before) != bool(after)

    def edit(source: str) -> str:
        start, _, line_end = _statement(source, before or after)
        if before:
            return f"{source[:start]}{text}\n{source[start:]}"
        return f"{source[:line_end]}\n{text}{source[line_end:]}"

    return Edit(frozenset({before or after}), edit)


def copy(marker: str, pattern: str, text: str, *, before: str = "", after: str = "") -> Edit:
    """Inserts what becomes of the marked statement when the match of `pattern` is replaced."""

    def edit(source: str) -> str:
        start, end, _ = _statement(source, marker)
        derived = _derive(source[start:end], pattern, text)
        return insert(derived, before=before, after=after).apply(source)

    return Edit(frozenset({marker, before or after}), edit)


def move(marker: str, *, before: str = "", after: str = "") -> Edit:
    """Moves the marked statement, with its marker, before or after another."""

    def edit(source: str) -> str:
        start, _, line_end = _statement(source, marker)
        rest = source[:start] + source[line_end:]
        return insert(source[start:line_end], before=before, after=after).apply(rest)

    return Edit(frozenset({marker, before or after}), edit)
