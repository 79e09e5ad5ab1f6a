"""Timelines as text and as pictures. Oracles: text written by hand, what matplotlib was asked to
draw, the file read back.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
from matplotlib.image import imread

from rorqual.parallel import Durations, make_orders, simulate
from rorqual.parallel.timeline import COLOURS, as_text, write_png

BY_HAND = """\
time  rank 0  rank 1
   0  0F0
   1  0F1     1F0
   2          1B0
   4  0B0     1F1
   5  |       1B1
   6  0F2     |
   7  0B1     1F2
   8  |       1B2
  10  0B2
  12  end"""

OVERLAPPED = "1F1+0B0"


def test_text_by_hand() -> None:
    assert as_text(simulate(make_orders("1f1b", 2, 3), Durations())) == BY_HAND


def test_sums_in_another_order_are_one_moment() -> None:
    """0.1 + 0.2 and 0.3: a moment has one line, and nothing goes on past its end."""
    durations = Durations(forward=0.1, backward=0.2, backward_weight=0.1)
    lines = as_text(simulate(make_orders("zb1p", 4, 8), durations)).splitlines()
    moments = [line.split()[0] for line in lines]
    assert len(set(moments)) == len(moments)
    assert "|" not in "".join(lines)


def test_a_pair_is_told_from_two_passes() -> None:
    lines = as_text(simulate(make_orders("dualpipev", 1, 3), Durations())).splitlines()
    pairs = [line.split()[1] for line in lines if "+" in line]
    assert pairs == [OVERLAPPED, "0F2+1B1", "1F2+0B1"]


def colours(file: Path) -> set[int]:
    pixels = numpy.rint(imread(io.BytesIO(file.read_bytes()))[..., :3] * 255).astype(int)
    return set(numpy.unique(pixels @ [65536, 256, 1]).tolist())


def rgb(colour: str) -> int:
    return int(colour.removeprefix("#"), 16)


@pytest.mark.parametrize(("name", "kinds"), [("1f1b", "FB"), ("zbv", "FIW"), ("dualpipe", "FBIW")])
def test_a_picture_has_the_colours_of_what_is_run(tmp_path: Path, name: str, kinds: str) -> None:
    file = tmp_path / "out.png"
    write_png(simulate(make_orders(name, 4, 8), Durations()), file, name)
    found = colours(file)
    for kind, shades in COLOURS.items():
        assert (rgb(shades[0]) in found) == (kind in kinds)
        assert (rgb(shades[1]) in found) == (kind in kinds and name != "1f1b")


def test_pairs_are_framed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many frames as pairs, one row a rank."""
    from matplotlib.axes import Axes

    drawn = []
    add_patch = Axes.add_patch
    monkeypatch.setattr(
        Axes, "add_patch", lambda axes, patch: (drawn.append(patch), add_patch(axes, patch))[1]
    )
    timeline = simulate(make_orders("dualpipev", 2, 6), Durations())
    write_png(timeline, tmp_path / "out.png", "")
    frames = [patch for patch in drawn if not patch.get_fill()]
    pairs = [
        (each.start, each.end)
        for own in timeline.ranks
        for each in own
        if len(each.action.parts) == 2
    ]
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in frames] == pairs
    num_parts = sum(len(each.action.parts) for own in timeline.ranks for each in own)
    assert len(drawn) == num_parts + len(pairs)
