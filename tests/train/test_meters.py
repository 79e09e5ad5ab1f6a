"""What a step costs. Oracles: a clock that the test sets, the closed form of FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_run import MODEL

from rorqual.model import preset
from rorqual.model.flops import training_flops_per_token
from rorqual.ops.ceilings import Peak
from rorqual.train import meters
from rorqual.train.meters import Laps, Memory, Meters

CPU = torch.device("cpu")


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_all_time_is_some_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    laps = Laps()
    for phase, seconds in (("data", 0.5), ("forward", 1.0), ("backward", 2.0), ("forward", 4.0)):
        clock.now += seconds
        laps.lap(phase)
    clock.now += 8.0
    assert laps.read() == {"data": 0.5, "forward": 5.0, "backward": 2.0}
    clock.now += 16.0
    laps.lap("optimizer")
    assert laps.read() == {"optimizer": 24.0}
    assert laps.read() == {}


class Mark:
    """An event of a GPU that is behind: it is done when the test says so."""

    made: list[Mark]
    num_done = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.place = len(Mark.made)
        Mark.made.append(self)

    def record(self, stream: object) -> None:
        assert stream == "the stream of cuda:1"

    def query(self) -> bool:
        return self.place < Mark.num_done

    def elapsed_time(self, other: Mark) -> float:
        assert other.query(), "nobody may wait for a mark"
        return 1000.0 * (other.place - self.place)


def test_marks_of_a_gpu_are_read_when_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    Mark.made, Mark.num_done = [], 1
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    laps = Laps(torch.device("cuda", 1))
    for phase in ("data", "forward", "backward", "optimizer"):
        laps.lap(phase)
    assert laps.read() == {}
    Mark.num_done = 4
    assert laps.read() == {"data": 1.0, "forward": 1.0, "backward": 1.0}
    laps.lap("data")
    Mark.num_done = 6
    assert laps.read() == {"optimizer": 1.0, "data": 1.0}


def test_mfu_is_the_share_of_all_ranks_peak() -> None:
    config = preset("tiny").with_changes(**{k: v for k, v in MODEL.items() if k != "preset"})
    flops = training_flops_per_token(config, 16, with_mtp=True)
    assert flops > training_flops_per_token(config, 16, with_mtp=False)
    found = Meters(Laps(), CPU, flops, Peak(1e9, "a test"), num_ranks=2)
    assert found.mfu(1000.0) == pytest.approx(1000.0 * flops / 2e9)
    assert Meters(Laps(), CPU, flops).mfu(1000.0) is None


def test_what_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "memory_bytes", lambda: (None, 7))
    found: dict[str, Any] = Meters(Laps(), CPU, 1.0).record(1000.0)
    assert found == {"memory_peak": 7, "seconds": {}}


def test_memory_is_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found = Clock(), iter([(1, 2), (3, 4)])
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(meters, "memory_bytes", lambda: next(found))
    memory = Memory()
    seen = []
    for seconds in (0.0, 0.5, 0.25, 0.25):
        clock.now += seconds
        seen.append(memory.read(CPU))
    assert seen == [(1, 2), (1, 2), (1, 2), (3, 4)]


def test_memory_is_the_processs() -> None:
    found = Meters(Laps(), CPU, 1.0, Peak(1e6, "a test")).record(1000.0)
    assert found["mfu"] == 0.001
    assert 1e7 < found["memory"] <= found["memory_peak"] < 1e12
