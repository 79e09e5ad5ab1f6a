"""`timeline.json`: what each rank of a pipeline ran when in a step, in the form of
`rorqual pipeline ORDER --json`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rorqual.errors import RorqualError
from rorqual.files import read_json
from rorqual.parallel import Action, Interval, Kind, Overlapped, Timeline

MOST_INTERVALS = 3000
"""More cannot be told apart in a picture: later ones are left out."""
_ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,9})")
_PAIR = re.compile(r"\((\w+);(\w+)\)OVERLAP_F_B")


def read_timeline(file: Path) -> Timeline | None:
    """None where there is no such file; RorqualError for one of another form. Begins at 0."""
    if not file.is_file():
        return None
    ranks = read_json(file).get("timeline")
    try:
        own = [[_interval(each) for each in rank] for rank in ranks or []]
    except (LookupError, TypeError, ValueError, OverflowError):
        own = []
    own = [sorted(rank, key=lambda each: each.start) for rank in own]
    if not any(own):
        raise RorqualError(
            "holds no timeline that can be drawn",
            where=file,
            expected="what `rorqual pipeline ORDER --json` prints",
        )
    begin = min(rank[0].start for rank in own if rank)
    starts = sorted(each.start for rank in own for each in rank)
    last = starts[min(len(starts), MOST_INTERVALS) - 1]
    return Timeline(
        tuple(
            tuple(
                Interval(each.action, each.start - begin, each.end - begin)
                for each in rank
                if each.start <= last
            )
            for rank in own
        )
    )


def _interval(record: dict[str, Any]) -> Interval:
    start, end = float(record["start"]), float(record["end"])
    if not -1e15 < start <= end < 1e15:
        raise ValueError("no interval of time")
    return Interval(_action(record["action"]), start, end)


def _action(text: str) -> Action | Overlapped:
    if (pair := _PAIR.fullmatch(text)) is not None:
        return Overlapped(_pass(pair[1]), _pass(pair[2]))
    return _pass(text)


def _pass(text: str) -> Action:
    found = _ACTION.fullmatch(text)
    if found is None:
        raise ValueError("no action")
    return Action(Kind(found[2]), int(found[1]), int(found[3]))
