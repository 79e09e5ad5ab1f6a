"""`rorqual report` from the command line: where it writes, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import run


def make_run(folder: Path) -> Path:
    folder.mkdir()
    record = {"kind": "step", "step": 1, "tokens": 64, "loss": 2.0, "main": 1.5, "mtp": []}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_it_writes_into_the_runs_folder_or_where_it_is_told(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    done = run("report", one)
    assert (done.code, done.out) == (0, f"{one / 'report.html'}\n"), done.err
    assert (one / "report.html").read_text().startswith("<!doctype html>")
    done = run("report", one, other)
    assert done.out == f"{one / 'compare.html'}\n"
    done = run("report", "one", "--output", "deep/x.html", folder=tmp_path)
    assert done.out == "deep/x.html\n"
    assert (tmp_path / "deep" / "x.html").is_file()


def test_what_is_no_run_is_a_message_and_2(tmp_path: Path) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        done = run("report", folder)
        assert (done.code, done.out) == (2, "")
        assert str(folder) in done.err
        assert "runs/NAME" in done.err
    one = make_run(tmp_path / "one")
    assert run("report", one, "--output", tmp_path).code == 2
    assert run("report", *[one] * 9).code == 2
    assert run("report").code == 2


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("report", make_run(tmp_path / "one"))
    assert done.code == 2
    assert "pip install 'rorqual[train]'" in done.err


def test_its_help_has_examples() -> None:
    assert "rorqual report runs/mine runs/wide" in run("report", "--help").out
