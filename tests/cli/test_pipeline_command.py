"""`rorqual pipeline` from the command line. Oracles: the report's Table 2 by hand, the room's own
functions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import run

from rorqual.parallel import Durations, make_orders, simulate
from rorqual.parallel.timeline import LEGEND, as_text


def test_all_orders_side_by_side() -> None:
    """Of 4 ranks, F = 1, B = 2, W = 1: 9 by (PP-1)(F+B), 3 by (PP-1)(F+B-2W), 2 by
    (PP/2-1)(F&B+B-3W); DualPipeV has twice as many stages of half the size: 3 by the same.
    """
    done = run("pipeline", "--pp", "4", "--micro-batches", "12")
    assert done.code == 0, done.err
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()[:7]}
    assert rows["1f1b"] == ["45", "9", "20.0%", "1x", "4", "9"]
    assert rows["zb1p"] == ["39", "3", "7.7%", "1x", "4", "3"]
    assert rows["dualpipe"] == ["38", "2", "5.3%", "2x", "5", "2"]
    assert rows["dualpipev"] == ["39", "3", "7.7%", "1x", "4.5", "3"]
    assert rows["interleaved"][:2] == ["40.5", "4.5"]
    assert "*" not in done.out


def test_what_does_not_hold_and_what_cannot_be_is_said() -> None:
    done = run("pipeline", "--pp", "3", "--micro-batches", "7", "--set", "forward=2")
    assert done.code == 0, done.err
    assert "3 *" in done.out
    assert "its assumption does not hold here" in done.out
    assert "dualpipe: DualPipe needs an even number of ranks" in done.out
    one = run("pipeline", "dualpipev", "--pp", "3", "--set", "forward=2").out
    assert "where F = B-W >= W, no sends, which does not hold here" in one
    report = json.loads(run("pipeline", "--pp", "3", "--micro-batches", "7", "--json").out)
    assert [row["order"] for row in report["orders"]] == ["1f1b", "zb1p", "zbv", "dualpipev"]
    assert set(report["refused"]) == {"interleaved", "dualpipe"}


def test_one_order_in_three_forms(tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    flags = ("pipeline", "zb1p", "--pp", "2", "--micro-batches", "3", "--set", "send=0.5")
    done = run(*flags, "--text", "--timeline", file)
    assert done.code == 0, done.err
    expected = simulate(make_orders("zb1p", 2, 3), Durations(send=0.5))
    assert done.out.startswith(f"{as_text(expected)}\n{LEGEND}\n")
    assert f"timeline: {file}" in done.out
    assert file.read_bytes().startswith(b"\x89PNG")
    report = json.loads(run(*flags, "--json").out)
    assert report["bubbles"] == expected.bubbles
    assert report["table_2"]["is_met"] is False
    first = report["timeline"][1][0]
    assert first == {"action": "1F0", "start": 1.5, "end": 2.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("gpipe",), "one of 1f1b, interleaved, zb1p, zbv, dualpipev, dualpipe"),
        (("--text",), "are for one order"),
        (("--chunks", "3"), "are for one order"),
        (("--timeline", "x.png"), "are for one order"),
        (("zbv", "--chunks", "3"), "only interleaved"),
        (("--set", "forwrd=1"), "did you mean 'forward'"),
        (("--set", "forward=0"), "forward is no duration"),
        (("--set", "send=1e308"), "send is no duration"),
        (("--set", "forward=5e-324"), "forward is no duration"),
        (("1f1b", "--micro-batches", "3"), "at least 4: one for each rank"),
        (("1f1b", "--pp", "1000", "--micro-batches", "9999999"), "too many passes to simulate"),
        (("--pp", "9999999"), "too many passes to simulate"),
        (("interleaved", "--chunks", "9999999"), "too many passes to simulate"),
    ],
)
def test_what_is_wrong_is_said(flags: tuple[str, ...], message: str) -> None:
    done = run("pipeline", *flags)
    assert done.code == 2
    assert message in done.err


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("pipeline", "1f1b", "--timeline", tmp_path / "out.png")
    assert done.code == 2
    assert "pip install 'rorqual[train]', or leave --timeline out" in done.err
