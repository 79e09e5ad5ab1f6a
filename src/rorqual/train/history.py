"""A run's metrics as pictures need them: bounded in size and time, however long the run was.

Of the lines of kind `step` are kept: every n-th, and of those between the one with the highest loss
and the one with the highest gradient norm, so that no spike is lost. Only kept lines are parsed. A
file may be written to while it is read, and may hold lines that a lost disk has damaged.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.files import NOT_JSON

MOST_STEPS, MOST_VALIDATIONS, MOST_LOADS, MOST_EVENTS = 1000, 1000, 60, 200
MOST_COUNTED = 1 << 60
STEP = b'{"kind": "step", '
PEAKS = (b'"loss": ', b'"grad_norm": ')
# In `seconds`: phases that few steps have.
MEASURED, SAVED, DRAWN = b'"validation"', b'"checkpoint"', b'"plots"'
NOW_AND_THEN = ("validation", "checkpoint", "plots")
Record = dict[str, Any]


@dataclass
class History:
    """What was kept, in the file's order. `is_even` tells of each step whether it is one of the
    evenly spread ones: those have in `seconds` of validations and the like, which few steps have,
    the mean of all steps that they stand for. `events` are the lines of all other kinds: the last
    ones, and how many there were of each.
    """

    steps: list[Record] = field(default_factory=list)
    is_even: list[bool] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    loads: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    num_events: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    num_damaged: int = 0

    @property
    def even_steps(self) -> list[Record]:
        return [step for step, is_even in zip(self.steps, self.is_even, strict=True) if is_even]


def read_history(path: Path, most_steps: int = MOST_STEPS) -> History:
    """Of a `metrics.jsonl`; an empty one where there is no such file yet."""
    history = History()
    steps = _Spread(most_steps, PEAKS)
    events: list[Record] = []
    validations, loads = _Spread(MOST_VALIDATIONS), _Spread(MOST_LOADS)
    for line in _lines(path):
        if line.startswith(STEP) and line.endswith(b"}\n"):
            steps.add(line)
            continue
        if not line.endswith(b"\n"):
            break  # the last one, which is being written, or never will be
        if line.startswith(b'{"kind": "load", '):
            loads.add(line)  # long ones: parsed only if they are kept
        elif (record := _parsed(line)) is None:
            history.num_damaged += 1
        elif record["kind"] == "step":
            steps.add(line)
        elif record["kind"] == "load":
            loads.add(line)
        elif record["kind"] == "validation":
            validations.add(line)
        else:
            history.num_events[record["kind"]] += 1
            events = [*events[-MOST_EVENTS + 1 :], record]
    history.events, history.num_steps = events, steps.num_lines
    for bucket in steps.buckets:
        for is_even, line in bucket.kept():
            if (record := _parsed(line)) is None:
                history.num_damaged += 1
                continue
            if is_even and bucket.now_and_then and isinstance(record.get("seconds"), dict):
                means = {
                    name: sum_ / bucket.num_lines for name, sum_ in bucket.now_and_then.items()
                }
                record["seconds"] = {**record["seconds"], **means}
            history.steps.append(record)
            history.is_even.append(is_even)
    for kept, into in ((validations, history.validations), (loads, history.loads)):
        records = [_parsed(bucket.last[1]) for bucket in kept.buckets]
        into += [record for record in records if record is not None]
        history.num_damaged += records.count(None)
    return history


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return


def _parsed(line: bytes) -> Record | None:
    """A line's record; None where it is none, or says not where in the run it belongs."""
    try:
        record = json.loads(line)
    except NOT_JSON:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    needed = ("step", "tokens") if record["kind"] in ("step", "validation") else ("step",)
    return record if all(_is_count(record.get(name)) for name in needed) else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < MOST_COUNTED


class _Bucket:
    """Consecutive lines: the last one, and the highest by each of some fields."""

    __slots__ = ("heights", "highest", "last", "now_and_then", "num_lines")

    def __init__(self, num_fields: int) -> None:
        self.last, self.num_lines = (-1, b""), 0
        self.now_and_then: dict[str, float] = {}  # seconds, summed
        self.heights = [-math.inf] * num_fields
        self.highest = [(-1, b"")] * num_fields

    def join(self, later: _Bucket) -> _Bucket:
        self.last = later.last
        self.num_lines += later.num_lines
        self.count(later.now_and_then)
        for place, height in enumerate(later.heights):
            if height > self.heights[place]:
                self.heights[place], self.highest[place] = height, later.highest[place]
        return self

    def count(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.now_and_then[name] = self.now_and_then.get(name, 0.0) + value

    def kept(self) -> Iterator[tuple[bool, bytes]]:
        """(whether it is one of the evenly spread, line), in order."""
        lines = dict([*self.highest, self.last])
        lines.pop(-1, None)
        for place in sorted(lines):
            yield place == self.last[0], lines[place]


class _Spread:
    """Lines spread evenly over all that are added: at least `most`, less than twice as many, and
    between them those with the highest figure in one of `fields`.
    """

    def __init__(self, most: int, fields: tuple[bytes, ...] = ()) -> None:
        self.most, self.fields = most, fields
        self.stride, self.num_lines = 1, 0
        self.buckets: list[_Bucket] = []

    def add(self, line: bytes) -> None:
        if self.num_lines % self.stride == 0:
            if len(self.buckets) == 2 * self.most:
                pairs = zip(self.buckets[::2], self.buckets[1::2], strict=True)
                self.buckets = [one.join(other) for one, other in pairs]
                self.stride *= 2
            self.buckets.append(_Bucket(len(self.fields)))
        bucket = self.buckets[-1]
        bucket.last = kept = (self.num_lines, line)
        bucket.num_lines += 1
        self.num_lines += 1
        if self.fields and (SAVED in line or MEASURED in line or DRAWN in line):
            bucket.count(_now_and_then(line))
        for place, name in enumerate(self.fields):
            height = _height(line, name)
            if height > bucket.heights[place]:
                bucket.heights[place], bucket.highest[place] = height, kept


def _now_and_then(line: bytes) -> dict[str, float]:
    """The seconds of phases that few steps have."""
    record = _parsed(line) or {}
    seconds = record.get("seconds")
    found = seconds.items() if isinstance(seconds, dict) else ()
    numbers = ((name, value) for name, value in found if name in NOW_AND_THEN and is_number(value))
    return {name: value for name, value in numbers if abs(value) < MOST_COUNTED}


def _height(line: bytes, name: bytes) -> float:
    """A field's number without parsing the line. What is no finite number is the highest."""
    start = line.find(name)
    if start < 0:
        return -math.inf
    start += len(name)
    end = line.find(b",", start)
    try:
        value = float(line[start:end] if end > 0 else line[start : line.find(b"}", start)])
    except ValueError:
        return math.inf
    return value if value - value == 0 else math.inf
