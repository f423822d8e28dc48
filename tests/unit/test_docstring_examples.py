"""The examples of all docstrings run, in one process."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *ROOT.glob("tpkernels/**/*.py"),
    *ROOT.glob("tpkernels_planner/*.py"),
    ROOT / "tools/doc_sections.py",
]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if ">>>" in path.read_text()
)
GLOBALS = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "tpk": tpk}


@pytest.fixture(autouse=True)
def no_world(monkeypatch):
    """An example may start a world of one rank, which ends with it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=GLOBALS)
    assert any(example.examples for example in found)
    for example in found:
        report = []
        result = doctest.DocTestRunner(optionflags=options).run(example, out=report.append)
        if dist.is_initialized():
            dist.destroy_process_group()
        assert result.failed == 0, "".join(report)
