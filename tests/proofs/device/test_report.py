"""report.py: tables between markers, current or not."""

from __future__ import annotations

import sys

import pytest
import report
from aot import Resources, Spec, Traffic

TEXT = "# Kernels\n\nBefore.\n\n{}\n{}\n\nBetween.\n\n{}\n\nold\n{}\nAfter.\n".format(
    *report.markers("triton"), *report.markers("cuda")
)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(*options): main()'s exit status on a file whose tables take no compiling; the file's
    path as command.file.
    """
    file = tmp_path / "kernels.md"
    file.write_text(TEXT)
    for name, nothing in dict(load=[], compile_all={}, measure_all={}).items():
        monkeypatch.setattr(report, name, lambda *_, nothing=nothing: nothing)
    monkeypatch.setattr(report, "triton_table", lambda *_: "| a table |")
    monkeypatch.setattr(report, "nvcc_version", lambda: None)

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(file), *options])
        return report.main()

    call.file = file
    return call


def test_text_around_survives(command):
    assert command() == 0
    begin, end = report.markers("triton")
    assert command.file.read_text() == TEXT.replace(
        f"{begin}\n{end}", f"{begin}\n\n| a table |\n\n{end}"
    )
    assert list(command.file.parent.iterdir()) == [command.file]


def test_check(command, capsys):
    assert command("--check") == 1
    assert "not current" in capsys.readouterr().err
    assert command.file.read_text() == TEXT
    assert command() == 0
    written = command.file.read_text()
    assert command("--check") == 0
    command.file.write_text(written.replace("a table", "b table"))
    assert command("--check") == 1


def test_faults_are_not_written(command, monkeypatch, capsys):
    spec = Spec("a spec", "module:kernel", {}, {}, chips=("sm_90",))
    monkeypatch.setattr(report, "load", lambda: [spec])
    monkeypatch.setattr(
        report, "compile_all", lambda specs: {("a spec", "sm_90"): Resources("sm_90", spills=8)}
    )
    assert command() == 1
    assert "a spec sm_90: spills 8 bytes a thread" in capsys.readouterr().err
    assert command.file.read_text() == TEXT


def test_markers_must_be_there_once():
    begin, end = report.markers("triton")
    for text in ("", begin, f"{end}\n{begin}", f"{begin}\n{end}\n{begin}\n{end}"):
        with pytest.raises(ValueError, match="the file needs one line"):
            report.replace(text, "triton", "table")


def test_another_nvcc_leaves_the_cuda_table(monkeypatch, capsys):
    sass = type(sys)("sass")
    sass.__spec__ = object()
    monkeypatch.setitem(sys.modules, "sass", sass)
    monkeypatch.setattr(report, "cuda_table", lambda nvcc: f"nvcc {nvcc}.\n\nits table")
    monkeypatch.setattr(report, "nvcc_version", lambda: "13.0.88")
    first = report.renew(TEXT, "table")
    assert "nvcc 13.0.88.\n\nits table" in first
    assert "old" not in first
    monkeypatch.setattr(report, "nvcc_version", lambda: "13.1.5")
    assert report.renew(first, "table") == first
    assert "nvcc 13.0.88's" in capsys.readouterr().err


def test_keep(command):
    assert report.keep("cuda", "| one |", command.file) is False
    assert "| one |" in command.file.read_text() and "Between." in command.file.read_text()
    assert report.keep("cuda", "| one |", command.file) is True


def test_row():
    made = Resources(
        "sm_90", 128, 40, 0, 0, 2048, opcodes={"LDG.E.128": 2, "LDG.E": 1, "STG.E.64": 1}
    )
    cells = report.row("`k`", "two", made, Traffic(moved=400, scratch=50, least=300, elements=100))
    assert cells == (
        *(
            "`k`",
            "two",
            "sm_90",
            "40",
            "0 B",
            "2048 of 232448 B",
            "75%",
            "128-bit loads, 64-bit stores",
        ),
        *("4", "0.5", "3"),
    )
    assert len(cells) == len(report.COLUMNS)
