"""`tpkernels tune` on one GPU, recorded: the first rank says what was measured."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from tpkernels import cli


@pytest.fixture
def tune(monkeypatch):
    """Return a function of a rank that runs the command and returns its output."""
    timings = SimpleNamespace(summary="fast")
    calibration = SimpleNamespace(timings={torch.bfloat16: timings}, measured_on="a GPU")
    ended = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "init_mesh", lambda world: {"tp": world})
    monkeypatch.setattr(cli, "calibrate", lambda group, shapes: (calibration, shapes)[0])
    key = SimpleNamespace(of=lambda group: SimpleNamespace(path="here"))
    monkeypatch.setattr(cli, "CalibrationKey", key)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))

    def run(rank):
        monkeypatch.setattr(cli, "resolve_group", lambda world: SimpleNamespace(rank=rank))
        result = CliRunner().invoke(cli.app, ["tune"])
        assert result.exit_code == 0 and ended.pop()
        return result.output

    return run


def test_the_first_rank_prints(tune):
    assert tune(0) == "bfloat16: fast\nmeasured on a GPU, saved in here\n"
    assert tune(1) == ""
