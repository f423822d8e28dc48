"""Writes the tables of docs/performance.md and the pictures in docs/images from saved results.

`python benchmarks/plot.py [FILE...]`: without files from the newest results that `make bench`
saved, and the newest of bench_link.py if there are any. If several files have a case, the figures
of the last one count. Only the sections and pictures that were measured are replaced.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import results
import tables

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.doc_sections import fill  # noqa: E402
from tpkernels_planner.files import write_atomically  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    text = "no pictures, which need matplotlib"
    parser.add_argument("--tables-only", action="store_true", help=text)
    options = parser.parse_args()
    files = options.files or results.newest(ROOT)
    if not files:
        parser.error("no results in .benchmarks: run `make bench` first, or name its JSON files")
    found, heads = results.load(files)
    text = fill(options.page.read_text(), tables.sections(found, heads))
    write_atomically(options.page, text)
    if not options.tables_only:
        import pictures  # it imports matplotlib, which the tables do without

        pictures.draw_all(found, options.page.parent / "images")


if __name__ == "__main__":
    main()
