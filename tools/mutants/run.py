"""Runs a sample of mutants: `python -m tools.mutants.run SAMPLE.csv`, in `make mutants-sampled`.

The record, build/mutants/SAMPLE.jsonl, has a line for each mutant: killed and by which test,
survived, timeout, equivalent (equivalents.csv says why) or gone, where its lines have changed. A
run goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

from . import warm
from .mutant import ROOT, Mutant, copied_tree, read_sample
from .reach import KERNELS, build_device_code, environment, record, tests_of

BUILD = ROOT / "build/mutants"
LIMIT = 60.0  # seconds of a mutant
EQUIVALENT_SHARE = 0.05


def _pytest(tree: Path, tests: list[str], interpret: bool, limit: float) -> str | None:
    """Return the first of the tests that fails, "" where none does, None where time is up."""
    names = tree / "tests-to-run.txt"
    names.write_text("\n".join(tests))
    arguments = ["-x", "-q", "-rfE", "--tb=no", f"@{names}"]
    status, said = warm.run(arguments, tree, environment(tree, interpret), limit)
    if not status:
        return status if status is None else ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M)
    return failed[1] if failed else f"pytest's exit status {status}"


def _fitting(tests: list[str], reach: dict[str, dict], seconds: float) -> list[str]:
    """Return the first tests that take no more than these seconds together."""
    chosen = []
    for test in tests:
        if reach[test]["seconds"] <= seconds:
            chosen.append(test)
            seconds -= reach[test]["seconds"]
    return chosen


def _run_in_turn(tests: list[str], tree: Path, reach: dict, limit: float) -> tuple[str, list[str]]:
    """Return the status of the fault in the tree, and the test that noticed it or tests in doubt.

    Few tests come first, so that a fault which stops one shows as a timeout of a short run. A test
    that takes too long has what time is left.
    """
    end, share = time.monotonic() + limit, 1 / 20
    while tests and (left := end - time.monotonic()) > limit / 20:
        chosen = _fitting(tests, reach, share * left) or tests[: share == 1 / 2]
        tests, share = [test for test in tests if test not in set(chosen)], 1 / 2
        for interpret in (False, True):
            part = [test for test in chosen if test.startswith(KERNELS) == interpret]
            noticed = _pytest(tree, part, interpret, end - time.monotonic()) if part else ""
            if noticed is None:
                return "timeout", part
            if noticed:
                return "killed", [noticed]
    return "survived", [""]


def examine(mutant: Mutant, tree: Path, reach: dict[str, dict], limit: float = LIMIT) -> dict:
    """Plant a fault in the tree and return its name, status, the test that noticed it, seconds.

    A timeout is a kill where the same tests take a fifth of the limit without the fault.
    """
    start = time.monotonic()
    tests = tests_of(mutant, (tree / mutant.path).read_text(), reach)
    with mutant.planted(tree) as found:
        if found and not mutant.path.endswith(".py"):
            build_device_code(tree)
        status, noticed = _run_in_turn(tests, tree, reach, limit) if found else ("gone", [""])
    seconds = round(time.monotonic() - start, 1)
    if status == "timeout":
        start = time.monotonic()
        without = _pytest(tree, noticed, noticed[0].startswith(KERNELS), limit)
        if without == "" and time.monotonic() - start < limit / 5:
            status = "killed"
        noticed = ["a timeout"]
    return dict(name=mutant.name, status=status, test=noticed[0], seconds=seconds)


def assert_right_without_faults(tests: set[str], tree: Path) -> None:
    """Assert that the tests that have noticed a fault pass where there is none."""
    for interpret in (False, True):
        part = sorted(test for test in tests if test.startswith(KERNELS) == interpret)
        failed = part and _pytest(tree, part, interpret, LIMIT * len(part))
        assert not failed, f"{failed} fails without a fault too: what it has noticed is in doubt"


def main() -> None:
    """Run the sample; the exit status tells whether each mutant was killed or is equivalent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--again", action="store_true", help="run anew what was not killed")
    parser.add_argument("--tests", default="tests/**/test_*.py", help="the test files, a pattern")
    options = parser.parse_args()
    with (ROOT / "tools/mutants/equivalents.csv").open(newline="") as rows:
        equivalent = {row["name"]: row["proof"] for row in csv.DictReader(rows)}
    file = BUILD / f"{options.sample.stem}.jsonl"
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    done = {r["name"]: r for r in records if not options.again or r["status"] == "killed"}
    sample = read_sample(options.sample)
    warm.import_what_is_slow()
    with copied_tree() as tree:
        reach = record(tree, BUILD / "reach", options.tests)
        for mutant in sample:
            if mutant.name in equivalent:
                done[mutant.name] = dict(name=mutant.name, status="equivalent")
            elif mutant.name not in done:
                found = examine(mutant, tree, reach)
                if found["seconds"] > 2 * LIMIT:  # the machine slept
                    found = examine(mutant, tree, reach)
                done[mutant.name] = found
                print(json.dumps(done[mutant.name]), flush=True)
                with file.open("a") as lines:
                    lines.write(json.dumps(done[mutant.name]) + "\n")
        noticed = {done[m.name]["test"] for m in sample if done[m.name]["status"] == "killed"}
        assert_right_without_faults(noticed & set(reach), tree)
    counts = Counter(done[mutant.name]["status"] for mutant in sample)
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    assert counts["equivalent"] <= EQUIVALENT_SHARE * len(sample), "too many equivalents"
    sys.exit(counts["killed"] + counts["equivalent"] < len(sample))


if __name__ == "__main__":
    main()
