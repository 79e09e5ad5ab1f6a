"""What rounds come to. Oracle: medians, shares and their spread worked out by hand."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from rorqual.bench.figures import Figure, Work
from rorqual.bench.plots import write_plot
from rorqual.bench.report import Report, Spread, rates_of
from rorqual.bench.weights import Form
from rorqual.cli.bench_tables import print_report
from rorqual.ops.ceilings import GemmRate, ReadRate

PNG = b"\x89PNG\r\n\x1a\n"
WORK = Work(num_bytes=100, flops=1, operands="bf16", num_tokens=1, experts=2)
GEMMS = [
    GemmRate("torch", "bf16", (4, 4, 4), 1e3),
    GemmRate("native BF16", "bf16", (4, 4, 4), 3e3),
    GemmRate("torch", "bf16", (8, 8, 8), 2e3),
    GemmRate("torch._int_mm", "int8", (4, 4, 4), 9e3),
]


def report() -> Report:
    """Three rounds of two engines: read rates of 1,000, 2,000 and 4,000 bytes a second let 10, 20
    and 40 tokens a second pass.
    """
    found = Report(about={"machine": "a CPU", "model": "m"})
    for read, ours, peer in ((1000, 5, 1), (2000, 15, 4), (4000, 10, 10)):
        found.add_machine(ReadRate(read, read / 2), GEMMS)
        for engine, rate in (("rorqual", ours), ("peer", peer)):
            figures = [Figure("decode", rate, "tokens/s", 32, 1, WORK), Figure("load", 2.0, "s")]
            found.add(engine, figures, read)
    found.forms["rorqual"] = Form(1, 2, "bfloat16", "bf16", "torch")
    return found


def test_spread_by_hand() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3, (3, 3))
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 10.0]) == Spread(3, 1, 10, (2, 4))


def test_shares_are_taken_round_by_round() -> None:
    """0.5, 0.75 and 0.25 of their rounds' limits: the median is 0.5, where that of the rates over
    that of the limits is as well; the peer's 0.1, 0.2, 0.25.
    """
    rows = {(row.engine, row.figure.what): row for row in report().ordered()}
    row = rows["rorqual", "decode"]
    assert row.limits == [10, 20, 40]
    assert row.share == Spread(0.5, 0.25, 0.75, (0.375, 0.625))
    assert row.value.median == 10
    assert row.bound == "bandwidth"
    peer = rows["peer", "decode"].share
    assert peer is not None
    assert peer.median == pytest.approx(0.2)
    assert rows["peer", "load"].share is None


def test_rows_of_one_kind_stand_beside_each_other() -> None:
    found = report()
    found.add("peer", [Figure("decode", 1, "tokens/s", 32, 8), Figure("memory", 1, "bytes")], 1)
    found.add("rorqual", [Figure("decode", 1, "tokens/s", 8, 16)], 1)
    order = [(row.engine, row.figure.label) for row in found.ordered()]
    assert order == [
        ("rorqual", "loading"),
        ("peer", "loading"),
        ("rorqual", "decode, 16 streams after 8"),
        ("rorqual", "decode, 1 stream after 32"),
        ("peer", "decode, 1 stream after 32"),
        ("peer", "decode, 8 streams after 32"),
        ("peer", "peak memory"),
    ]
    assert [len(rows) for rows in rates_of(found, "decode").values()] == [2, 2]


def test_the_best_of_any_implementation_and_shape_is_the_ceiling() -> None:
    found = report()
    assert found.best_gemms() == {"bf16": 3e3, "int8": 9e3}
    assert Report().best_gemms() == {}
    assert [row["flops"] for row in found.gemm_table()] == [1e3, 3e3, 2e3, 9e3]


def test_the_tables_keys_stay() -> None:
    """Others read them: a change of these is a new number of the schema."""
    table = json.loads(json.dumps(report().as_dict()))
    assert table["schema"] == 1
    keys = "schema machine model is_complete ceilings forms rows missing notes"
    assert set(table) == set(keys.split())
    assert set(table["rows"][0]) == set(
        "engine what num_tokens num_streams unit values median min max quartiles share limits "
        "bound work".split()
    )
    (row,) = (r for r in table["rows"] if (r["engine"], r["what"]) == ("rorqual", "decode"))
    assert (row["values"], row["median"], row["min"], row["max"]) == ([5, 15, 10], 10, 5, 15)
    assert row["share"] == {"median": 0.5, "min": 0.25, "max": 0.75, "quartiles": [0.375, 0.625]}
    assert set(row["work"]) == {"num_bytes", "flops", "operands", "num_tokens", "experts"}
    assert table["ceilings"]["read"]["values"] == [1000, 2000, 4000]
    assert table["ceilings"]["read"]["median"]["median"] == 1000
    assert table["ceilings"]["gemm"][1] == {
        "kernels": "native BF16", "operands": "bf16", "shape": [4, 4, 4], "flops": 3e3,
    }  # fmt: skip
    assert table["forms"]["rorqual"]["storages"] == "bfloat16"
    assert Report().as_dict()["ceilings"] == {"read": None, "gemm": []}


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_picture_is_a_png(tmp_path: Path, has_rows: bool) -> None:
    found = report() if has_rows else Report(gemms=[GEMMS])
    write_plot(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert len(list(tmp_path.iterdir())) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_no_figure_is_cut(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns names go on in the next line; in a file nothing does."""
    monkeypatch.setenv("COLUMNS", "80")
    found = report()
    figure = Figure("decode", 123_456.7, "tokens/s", 8192, 16, WORK)
    for read in (1e9, 2e9, 4e9):
        found.add("ik_llama.cpp", [figure], read)
    found.missing["vllm"] = "it said \x1b[2J"
    with redirect_stdout(output):
        print_report(found)
    shown = output.getvalue()
    assert "\u2026" not in shown, "an ellipsis"
    assert shown.count("123,456.7") == 3  # the median, the least and the most
    assert "vllm: it said \\x1b[2J" in shown
    if not output.isatty():
        (row,) = [line for line in shown.splitlines() if "ik_llama.cpp" in line]
        assert row.startswith("decode, 16 streams after 8,192  ik_llama.cpp  123,456.7")
        assert row.endswith("compute")
