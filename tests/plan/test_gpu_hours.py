"""Hours of devices. Oracle: the report's Table 1 and §4.3, FLOPs by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.model import preset
from rorqual.plan.devices import HARDWARE
from rorqual.plan.gpu_hours import (
    EXTENSION_HOURS,
    REPORTED_HOURS,
    device_hours,
    extension_hours,
    fitted_mfu,
)

V3 = preset("671b")
TOKENS = 14.8e12


def test_the_reports_hours_come_out_again() -> None:
    found = device_hours(V3, TOKENS, 4096, HARDWARE["H800"])
    assert found == pytest.approx(REPORTED_HOURS)
    # §1: 180K hours a trillion tokens, 3.7 days of 2,048.
    assert device_hours(V3, 1e12, 4096, HARDWARE["H800"]) == pytest.approx(180e3, rel=1e-3)
    assert device_hours(V3, 1e12, 4096, HARDWARE["H800"]) / 2048 / 24 == pytest.approx(3.7, 0.02)


def test_the_share_by_hand() -> None:
    """37.5B parameters of a token but the embedding, an MTP module with its pass through the head,
    and attention over 2,048 keys: six FLOPs each.
    """
    matrices = 37_552_282_624 - 129280 * 7168
    layer = matrices / 61
    mtp = 129280 * 7168 + 2 * 7168**2
    attention = 62 * 128 * (192 + 128) * 4097 / 2
    # The MTP block is a sparse layer: about one 61st of the main model's.
    about = 6 * (matrices + layer + mtp + attention)
    assert fitted_mfu() == pytest.approx(about * TOKENS / (REPORTED_HOURS * 3600 * 989.5e12), 0.03)


def test_the_extension_is_foretold_and_the_error_is_told() -> None:
    """Not fitted: whatever comes out, it is stated."""
    by_hand = 0.0
    for sequences, length in ((1920, 32768), (480, 131072)):
        tokens = 1000 * sequences * length
        attention = 6 * 62 * 128 * (192 + 128) * (length - 4096) / 2
        here = device_hours(V3, tokens, 4096, HARDWARE["H800"])
        more = tokens * attention / (fitted_mfu() * 989.5e12 * 3600)
        by_hand += here + more
    assert extension_hours() == pytest.approx(by_hand, rel=1e-3)
    assert extension_hours() < EXTENSION_HOURS


def test_other_devices_and_twice_the_tokens() -> None:
    h800, a100 = HARDWARE["H800"], HARDWARE["A100-80"]
    one = device_hours(V3, 1e9, 4096, h800)
    assert device_hours(V3, 2e9, 4096, h800) == pytest.approx(2 * one)
    assert device_hours(V3, 1e9, 4096, a100) == pytest.approx(one * 989.5 / 312)
    assert device_hours(V3, 1e9, 4096, h800.times(8)) == pytest.approx(one)


def test_the_page_says_these_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert f"The share, {100 * fitted_mfu():.1f} %," in page
    assert f"comes to {extension_hours() / 1e3:.0f}K hours" in page
    assert f"{100 * (1 - extension_hours() / EXTENSION_HOURS):.0f} % too few" in page
