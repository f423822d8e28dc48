"""The overlap engine under NCCL's semantics, without a GPU: see deferred.py.

Mutants of the engine prove that the checks bite.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deferred import MODES
from engine_case import check
from engine_linear_cases import linear_cases, norm_cases
from engine_loss_cases import loss_cases
from engine_mutants import MUTANTS
from engine_peer_cases import peer_cases
from engine_source import ROOT, engine_markers, mutants_source
from torch.utils import cpp_extension


def run_engine(mode, chunks):
    # Fewer rows than a GEMM tile, boundaries at 128, one row, none; the last chunk is ragged.
    return [
        text
        for rows in (37, 300, 1, 0)
        for made in (linear_cases, norm_cases, loss_cases)
        for case in made(chunks, rows)
        for text in check(case, "tpkernels", mode)
    ]


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_engine_waits_for_each_collective_once_and_where_it_must(pool, ranks, mode, chunks):
    assert pool.run(ranks, run_engine, mode, chunks) == [[]] * ranks


def build(source: str) -> str:
    """The library built from `source`, from the cache if it is there."""
    folder = ROOT / "build" / "mutants"
    name = "mutants_" + hashlib.sha256((source + torch.__version__).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if library.exists():
        return str(library)
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own: an interrupted build leaves no lock behind.
    with tempfile.TemporaryDirectory(dir=folder) as here:
        code = Path(here) / "mutants.cpp"
        code.write_text(source)
        flags = ["-O0", "-g0", "-w"]
        options = dict(build_directory=here, is_python_module=False)
        cpp_extension.load(name, [str(code)], flags, **options)
        for old in folder.glob("mutants_*.so"):
            old.unlink(missing_ok=True)
        os.replace(Path(here) / library.name, library)
    return str(library)


def all_cases():
    """Made afresh for each mutant: some calls change their arguments."""
    for made in (linear_cases, norm_cases, loss_cases, peer_cases):
        yield from made(3, 50)


def run_mutants(library, mode, mutants):
    """Complaints about each of them, up to the first call in which a rank finds something."""
    torch.ops.load_library(library)
    found = {i: [] for i in mutants}
    for i in mutants:
        name = f"tpk_mutant_{i}"
        for case in all_cases():
            if not hasattr(getattr(torch.ops, name), case.op):
                continue
            found[i] += check(case, name, mode)
            dist.all_reduce(dead := torch.tensor(len(found[i])))
            if dead:
                break
    return found


def test_every_mutant_of_the_engine_is_caught(pool, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    names = ["the engine", *MUTANTS]
    library, found, alive = build(mutants_source()), {}, list(range(len(names)))
    for mode in MODES:  # the first mode's dead are not run in the second
        ranks = pool.run(2, run_mutants, library, mode, alive)
        found.update({i: [text for rank in ranks for text in rank[i]] for i in alive})
        more_ranks = pool.run(3, run_mutants, library, mode, [0])
        found[0] += [text for rank in more_ranks for text in rank[0]]
        assert not found[0], found[0]  # the engine, built in the same way, passes
        alive = [i for i in alive if not found[i]]
    survivors = [names[i] for i in alive if i]
    print()
    for i, name in enumerate(names[1:], 1):
        print(f"  {name}: {found[i][0] if found[i] else 'SURVIVED'}")
    print(f"mutants killed: {len(MUTANTS) - len(survivors)} / {len(MUTANTS)}")
    assert not survivors


def test_every_marker_of_the_engine_is_used():
    used = {marker for edits in MUTANTS.values() for edit in edits for marker in edit.markers}
    assert engine_markers() == used
