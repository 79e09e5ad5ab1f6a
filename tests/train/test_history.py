"""Reading a run's metrics, thinned. Oracles: `read_metrics` of short files, and lines whose place
says what must be kept.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rorqual.train import history as history_module
from rorqual.train.curves import column, smooth
from rorqual.train.history import MOST_EVENTS, MOST_LOADS, read_history
from rorqual.train.load_maps import load_maps
from rorqual.train.metrics import read_metrics
from rorqual.train.router_bias import max_violation

MOST = 50


def line(step: int, **changes: Any) -> str:
    record = {"step": step, "tokens": 10 * step, "loss": 2.0, "main": 1.0, "grad_norm": 0.5}
    return json.dumps({"kind": "step", **record, **changes}) + "\n"


def write(file: Path, *lines: str) -> Path:
    file.write_text("".join(lines), encoding="utf-8")
    return file


def test_a_short_run_is_kept_whole(finished_run: Path) -> None:
    file = finished_run / "metrics.jsonl"
    run, records = read_history(file), read_metrics(file)
    assert run.steps == run.even_steps == [r for r in records if r["kind"] == "step"]
    assert run.loads == [r for r in records if r["kind"] == "load"]
    assert run.num_damaged == 0
    assert run.num_steps == 8


@pytest.mark.parametrize("num_steps", [2 * MOST, 2 * MOST + 1, 3 * MOST, 777, 6400])
def test_of_a_long_run_steps_are_kept_evenly_with_the_last_one(
    tmp_path: Path, num_steps: int
) -> None:
    file = write(tmp_path / "metrics.jsonl", *(line(step) for step in range(1, num_steps + 1)))
    run = read_history(file, MOST)
    even = [record["step"] for record in run.even_steps]
    assert MOST <= len(even) <= 2 * MOST
    assert even[-1] == num_steps == run.num_steps
    gaps = np.diff([0, *even])
    assert len(set(gaps[:-1])) == 1, "all but the last are equally far apart"
    assert gaps[-1] <= gaps[0]


def test_spikes_between_them_are_kept(tmp_path: Path) -> None:
    spikes: dict[int, dict[str, float]] = {
        1234: {"loss": 50.0},
        4321: {"grad_norm": 99.0},
        5432: {"loss": float("nan")},
        5555: {"grad_norm": float("inf")},
    }
    steps = (line(step, **spikes.get(step, {})) for step in range(1, 6401))
    run = read_history(write(tmp_path / "metrics.jsonl", *steps), MOST)
    kept = [record["step"] for record in run.steps]
    assert set(spikes) <= set(kept)
    assert kept == sorted(kept)
    assert len(kept) <= 3 * 2 * MOST
    assert not set(spikes) & {record["step"] for record in run.even_steps}


def test_phases_of_few_steps_are_the_mean_of_those_that_a_kept_one_stands_for(
    tmp_path: Path,
) -> None:
    """By hand: 6,400 steps of which every hundredth waited 3 seconds for a save."""

    def seconds(step: int) -> dict[str, float]:
        return {"forward": 1.0, "checkpoint": 3.0} if step % 100 == 0 else {"forward": 1.0}

    steps = (line(step, seconds=seconds(step)) for step in range(1, 6401))
    run = read_history(write(tmp_path / "metrics.jsonl", *steps), MOST)
    gap = run.even_steps[1]["step"] - run.even_steps[0]["step"]
    waited = [step["seconds"].get("checkpoint", 0.0) * gap for step in run.even_steps]
    assert sum(waited) == pytest.approx(64 * 3.0)
    assert all(step["seconds"]["forward"] == 1.0 for step in run.even_steps)
    short = read_history(write(tmp_path / "short.jsonl", line(1, seconds=seconds(100))), MOST)
    assert short.steps[0]["seconds"] == seconds(100)


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [line(1), "???\n", '{"kind": "step", "step": 2}\n', line(3), '{"kind": 3}\n', "\n"]
    file.write_bytes("".join(lines).encode() + b"\xff\xfe\x00\n" + line(4).encode()[:-9])
    run = read_history(file)
    assert [record["step"] for record in run.steps] == [1, 3]
    assert run.num_damaged == 5


def test_keys_in_another_order_are_the_same(tmp_path: Path) -> None:
    other = json.dumps({"step": 1, "tokens": 10, "loss": 1.0, "kind": "step"}) + "\n"
    load = json.dumps({"step": 1, "load": [[1.0, 1.0]], "kind": "load"}) + "\n"
    run = read_history(write(tmp_path / "metrics.jsonl", other, load))
    assert [record["step"] for record in run.steps] == [1]
    assert len(run.loads) == 1


def test_other_kinds_are_events_of_which_the_last_stay(tmp_path: Path) -> None:
    lines = [f'{{"kind": "skipped", "step": {step}}}\n' for step in range(MOST_EVENTS + 7)]
    run = read_history(write(tmp_path / "metrics.jsonl", *lines))
    assert [event["step"] for event in run.events] == list(range(7, MOST_EVENTS + 7))
    assert run.num_events == {"skipped": MOST_EVENTS + 7}


def test_only_what_is_kept_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    load = json.dumps({"kind": "load", "step": 1, "load": [[1.0] * 64] * 8}) + "\n"
    lines = [each for step in range(5000) for each in (line(step), load)]
    file = write(tmp_path / "metrics.jsonl", *lines)
    real = history_module._parsed
    monkeypatch.setattr(
        history_module, "_parsed", lambda text: (parsed.append(text), real(text))[1]
    )
    run = read_history(file, MOST)
    assert len(parsed) == len(run.steps) + len(run.loads) <= 2 * (3 * MOST + MOST_LOADS)


def test_there_may_be_no_file_yet(tmp_path: Path) -> None:
    assert read_history(tmp_path / "metrics.jsonl").steps == []


@pytest.mark.slow  # 500 MB of lines
def test_a_million_steps_take_seconds(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    padding = {f"field_{number}": 0.123456789 for number in range(16)}
    with file.open("w") as out:
        out.writelines(line(step, **padding) for step in range(1_000_000))
    began = time.process_time()
    run = read_history(file)
    assert time.process_time() - began < 10
    assert run.num_steps == 1_000_000


@pytest.mark.parametrize(("length", "window"), [(1500, 50), (200, 10), (30, 1)])
def test_the_running_mean_is_that_of_the_last_fifty_or_fewer(length: int, window: int) -> None:
    values = np.random.default_rng(0).random(length)
    wanted = [values[max(0, end - window) : end].mean() for end in range(1, length + 1)]
    assert smooth(values.tolist()) == pytest.approx(wanted)


def test_the_running_mean_goes_on_past_what_is_no_number() -> None:
    values = np.full(60, 2.0)
    values[[0, 10, 11, 30]] = np.nan, np.nan, np.inf, np.nan
    found = np.array(smooth(values.tolist()))  # of three
    assert np.isnan(found[0])
    assert np.array_equal(found[1:], np.full(59, 2.0))


def test_a_column_has_a_number_or_nan_for_each() -> None:
    rows = [{"a": {"b": [1]}}, {"a": 3}, {"a": {"b": [True]}}, {"a": {"b": []}}, {}]
    assert np.array_equal(column(rows, "a", "b", 0), [1.0, *[np.nan] * 4], equal_nan=True)


def test_max_vio_of_a_map_is_the_routers(tmp_path: Path) -> None:
    loads = torch.tensor([[5.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    record = {"kind": "load", "step": 1, "load": (loads / loads.mean(-1, True)).tolist()}
    run = read_history(write(tmp_path / "metrics.jsonl", json.dumps(record) + "\n"))
    (found,) = load_maps(run)
    assert found.max_vio == pytest.approx(max_violation(loads).tolist())
