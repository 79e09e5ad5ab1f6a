"""The page of a run. Oracles: a parser of HTML, the formulas that the run was made by, text that
would be markup.
"""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_run import RECIPE, TIMELINE, load_record, records, step_record, write_run

from rorqual.errors import UsageError
from rorqual.parallel import PIPELINE_ORDERS, Durations, simulate_pipeline
from rorqual.report import open_run, write_page
from rorqual.report.run import figures
from rorqual.report.timeline_file import MOST_INTERVALS, read_timeline
from rorqual.train.load_maps import load_maps

VOID = {"meta", "br"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "dl", "dt", "dd"),
    *("div", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "details"),
    *(
        "summary",
        "pre",
        "svg",
        "g",
        "path",
        "defs",
        "text",
        "tspan",
        "use",
        "image",
        "clippath",
        "rect",
    ),
}
EVIL = "<script>alert(1)</script>\"'&</pre></td></svg>$\\frac$"
MOST_BYTES = 3_000_000


class Page(HTMLParser):
    """A page's elements, each closed where it must be; AssertionError for a page that is not so."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(*folders: Path) -> tuple[str, Page]:
    file = folders[0] / "report.html"
    write_page([open_run(folder) for folder in folders], file)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags <= ALLOWED, page.tags - ALLOWED
    assert len(set(page.ids)) == len(page.ids), "an id is there twice"
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(text) < MOST_BYTES
    return text, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    lines = records(100)
    for line in lines:
        if line["kind"] == "step":  # as of several ranks
            line |= {"bytes_within_nodes": 7_000_000, "bytes_between_nodes": 2_000_000}
    lines.insert(50, {"kind": "rollback", "step": 40, "to": 30, "why": EVIL})
    folder = tmp_path_factory.mktemp("report") / "whole"
    return page_of(write_run(folder, lines, timeline=TIMELINE))


def test_it_shows_all_that_there_is(whole: tuple[str, Page]) -> None:
    _, page = whole
    wanted = ("Loss", "Held out", "Learning rate", "Gradient norm", "Speed", "Memory", "Batch")
    wanted += (
        "Sent between ranks",
        "between nodes",
        "Model FLOPs utilisation",
        "Time by phase",
        "Balance of the experts",
    )
    wanted += ("MaxVio by layer", "Experts over time, by layer", "Timeline of a step", "Events")
    for title in (*wanted, "Recipe", "1 rollback", "made", "stage pretrain", "forward", "rank 1"):
        assert title in page.text, title
    assert "total_tokens = 4096000" in page.text


def test_its_figures_are_those_of_the_run(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, records(100)))
    found = figures(run)
    assert found["steps"] == "100"
    assert found["tokens"] == "102.4K of 4.096M"
    main = sum(step_record(step)["main"] for step in range(51, 101)) / 50
    assert found["loss"] == f"{main:.4g}"
    assert found["held out"] == "1.4 bits a byte"
    assert found["speed"] == "2,003 tokens/s"
    assert found["MFU"] == "31.0%"
    assert found["memory"] == "1.2 GB at most"
    assert found["time in steps"] == "00:00:51"  # 102,400 tokens at 2,000 to 2,006 a second


def test_nothing_from_files_becomes_markup(tmp_path: Path) -> None:
    recipe = RECIPE.replace('"made"', json.dumps(EVIL))
    step = step_record(1, metrics={EVIL: 1.0}, seconds={EVIL: 1.0})
    lines = [
        step,
        {**load_record(1), "layers": [EVIL, "$x$"]},
        {"kind": EVIL, "step": 1, EVIL: EVIL},
    ]
    folder = tmp_path / "<b>&"
    text, page = page_of(write_run(folder, lines, recipe=recipe))
    assert "<script" not in text
    assert "<b>&" in page.text
    assert page.text.count("alert(1)") >= 8  # title, heading, figures, legends, event, recipe


def test_no_network_and_no_script_is_asked_for(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert re.findall(r"https?://(?!www\.w3\.org/)", text) == []
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "img"})


def test_light_and_dark_are_the_readers(whole: tuple[str, Page]) -> None:
    """Text and axes have the page's colour; no white paper below a picture. The numbers in a
    timeline stand on colours of their own.
    """
    text = whole[0].partition("Timeline of a step")[0]
    assert "currentColor" in text
    assert not re.search(r"#0{6}|#010203|fill: #fff", text)


@pytest.mark.parametrize(("num_steps", "says"), [(0, "No step has been made yet"), (1, "steps 1")])
def test_a_run_that_has_only_begun(tmp_path: Path, num_steps: int, says: str) -> None:
    assert says in page_of(write_run(tmp_path, records(num_steps)))[1].text


def test_a_run_before_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert "No step has been made yet" in page_of(tmp_path)[1].text


def test_damage_is_told_and_the_rest_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path, records(40), recipe="name = ", timeline={"timeline": [[{}]]})
    text = (folder / "metrics.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    whole = "".join([*lines[:5], "\x00\x00 garbage\n", *lines[5:]])
    (folder / "metrics.jsonl").write_text(whole + '{"kind": "step", "st')
    _, page = page_of(folder)
    assert "1 line is damaged" in page.text
    assert "recipe.toml is not whole TOML" in page.text
    assert "timeline.json: holds no timeline that can be drawn" in page.text
    assert "steps 40" in page.text


ODD: list[dict[str, Any]] = [
    {"main": None, "mtp": None, "loss": float("nan"), "grad_norm": float("inf")},
    {"main": "text", "mtp": [], "seconds": [], "metrics": 3, "memory": -1},
    {"lr": 0.0, "tokens_per_second": 0.0, "mfu": 1e300, "seconds": {"data": -1.0}},
    {"metrics": {"half \ud800 a character, \x00": 1.0}, "bytes_within_nodes": 1e9},
    {"main": 10**400, "mtp": [None, 1.0], "tokens": 0, "seconds": {}},
]


def test_odd_figures_end_no_page(tmp_path: Path) -> None:
    page_of(write_run(tmp_path, [step_record(1 + n, **changes) for n, changes in enumerate(ODD)]))


@pytest.mark.slow  # a page each
@pytest.mark.parametrize("changes", ODD, ids=lambda changes: next(iter(changes)))
def test_odd_figures_alone_end_no_page(tmp_path: Path, changes: dict[str, Any]) -> None:
    lines = [step_record(step, **changes) for step in range(1, 4)]
    page_of(write_run(tmp_path, lines))
    page_of(write_run(tmp_path, [step_record(1), *lines]))
    other = write_run(tmp_path / "other", lines)
    page_of(tmp_path, other)


LOADS: list[object] = [3, {}, [], [[]], [[1.0], [1.0, 2.0]], [3], [[0.0, 0.0]], [[None, "x"]]]


def test_odd_loads_end_no_page(tmp_path: Path) -> None:
    """Of the last one, two experts of which nothing is known, there is a map without colours."""
    page_of(write_run(tmp_path, [{"kind": "load", "step": 1, "load": load} for load in LOADS]))
    shapes = []
    for load in LOADS:
        run = open_run(write_run(tmp_path, [{"kind": "load", "step": 1, "load": load}]))
        shapes += [(len(each.load_LE), len(each.load_LE[0])) for each in load_maps(run.history)]
        assert all(math.isnan(value) for each in load_maps(run.history) for value in each.max_vio)
    assert shapes == [(1, 2), (1, 2)]


def test_two_runs_beside_each_other(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", records(40))
    other = write_run(
        tmp_path / "other", records(20), recipe=RECIPE.replace("seed = 3", "seed = 4")
    )
    _, page = page_of(one, other)
    assert "seed 3 4" in page.text
    assert "total_tokens" not in page.text
    for name in (str(one), str(other)):
        assert page.text.count(name) > 5, "each picture names it"
    _, page = page_of(one, one)
    assert "They differ in nothing" in page.text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_run(tmp_path / "nothing")
    with pytest.raises(UsageError, match="an empty folder"):
        open_run(tmp_path)
    (tmp_path / "weights").touch()
    with pytest.raises(UsageError, match="weights"):
        open_run(tmp_path)
    with pytest.raises(UsageError, match="a run's folder is needed"):
        open_run(tmp_path / "weights")
    checkpoint = write_run(tmp_path / "run", []) / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UsageError, match=f"name the run: {re.escape(str(tmp_path / 'run'))}"):
        open_run(checkpoint)


def test_a_timeline_begins_at_its_first_action(tmp_path: Path) -> None:
    (tmp_path / "timeline.json").write_text(json.dumps(TIMELINE))
    found = read_timeline(tmp_path / "timeline.json")
    assert found is not None
    spans = [[(str(e.action), e.start, e.end) for e in rank] for rank in found.ranks]
    assert spans[0] == [("0F0", 0.0, 1.0), ("0B0", 3.0, 5.0)]
    assert spans[1][1] == ("(1F1;1B0)OVERLAP_F_B", 2.0, 3.0)
    assert read_timeline(tmp_path / "none.json") is None


@pytest.mark.parametrize("order", PIPELINE_ORDERS)
def test_every_order_is_read_as_it_is_written(tmp_path: Path, order: str) -> None:
    """As `rorqual pipeline --json` and a real run write it."""
    timed = simulate_pipeline(order, 4, 8, Durations(send=0.25))
    (tmp_path / "timeline.json").write_text(json.dumps(timed.with_intervals()))
    assert read_timeline(tmp_path / "timeline.json") == timed.timeline


def test_a_long_timeline_is_cut(tmp_path: Path) -> None:
    own = [{"action": f"0F{i}", "start": i, "end": i + 1} for i in range(2 * MOST_INTERVALS)]
    (tmp_path / "timeline.json").write_text(json.dumps({"timeline": [own]}))
    found = read_timeline(tmp_path / "timeline.json")
    assert found is not None
    assert found.end == len(found.ranks[0]) == MOST_INTERVALS


def test_a_long_run_makes_no_longer_page(tmp_path: Path) -> None:
    lines = [step_record(step, grad_norm=(step * 7919) % 97) for step in range(1, 8001)]
    lines += [load_record(step) for step in range(1, 300)]
    lines += [{"kind": "skipped", "step": step, "samples": [step]} for step in range(1000)]
    _, page = page_of(write_run(tmp_path, lines))
    assert "of 8,000 steps" in page.text
    assert "1,000 skipped; the last 200" in page.text
