"""The overlap engine under NCCL's semantics, without a GPU: see deferred.py. Mutants of the engine prove that the checks bite."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deferred import MODES
from engine_cases import cases, check, loss_cases, norm_cases, peer_cases
from engine_mutants import MUTANTS
from engine_source import ROOT, mutants_source
from torch.utils import cpp_extension


def run_engine(mode, chunks):
    # Fewer rows than a GEMM tile, boundaries at 128, one row, none; the last chunk is ragged.
    return [
        text
        for rows in (37, 300, 1, 0)
        for made in (cases, norm_cases, loss_cases)
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
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as here:  # a folder of its own: an interrupted build leaves no lock behind
            code = Path(here) / "mutants.cpp"
            code.write_text(source)
            cpp_extension.load(
                name,
                [str(code)],
                ["-O0", "-g0", "-w"],
                build_directory=here,
                is_python_module=False,
            )
            for old in folder.glob("mutants_*.so"):
                old.unlink(missing_ok=True)
            os.replace(Path(here) / library.name, library)
    return str(library)


def run_mutants(library, mode, mutants):
    """What is wrong with each of them, up to the first call in which a rank finds something."""
    torch.ops.load_library(library)
    found = {}
    for i in mutants:
        name = f"tpk_mutant_{i}"
        found[i] = []
        for case in (
            case for made in (cases, norm_cases, loss_cases, peer_cases) for case in made(3, 50)
        ):  # some change what they are given
            if hasattr(getattr(torch.ops, name), case.op):
                found[i] += check(case, name, mode)
                dist.all_reduce(dead := torch.tensor(len(found[i])))
                if dead:
                    break
    return found


def test_every_mutant_of_the_engine_is_caught(pool, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    library, found, alive = build(mutants_source()), {}, list(range(1 + len(MUTANTS)))
    for mode in MODES:  # what dies in the first is not run in the second
        ranks = pool.run(2, run_mutants, library, mode, alive)
        found.update({i: [text for rank in ranks for text in rank[i]] for i in alive})
        found[0] += [
            text for rank in pool.run(3, run_mutants, library, mode, [0]) for text in rank[0]
        ]
        assert not found[0], found[0]  # the engine, built in the same way, passes
        alive = [i for i in alive if not found[i]]
    print()
    names = ["the engine", *MUTANTS]
    for i, name in enumerate(names[1:], 1):
        print(f"  {name}: {found[i][0] if found[i] else 'SURVIVED'}")
    survivors = [names[i] for i in alive if i]
    print(f"mutants killed: {len(MUTANTS) - len(survivors)} / {len(MUTANTS)}")
    assert not survivors
