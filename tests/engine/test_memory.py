"""Budgets by hand; what the system says is free is only plausible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rorqual.engine import memory
from rorqual.errors import UsageError

CPU = torch.device("cpu")


def test_what_is_asked_for_is_given() -> None:
    assert memory.budget_bytes(1000, 5, CPU) == 1000
    assert 0 < memory.budget_bytes(0.25, 5, CPU) < memory.budget_bytes(0.75, 5, CPU)
    assert memory.budget_bytes(None, 5, CPU) == 5
    half = memory.free_bytes(CPU) // 2
    assert memory.budget_bytes(None, 1 << 60, CPU) == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        memory.budget_bytes(share, 5, CPU)


def test_two_blocks_are_the_least() -> None:
    assert memory.num_blocks(2000, 999) == 2
    with pytest.raises(UsageError, match="too small"):
        memory.num_blocks(1997, 999)


def test_a_container_has_less_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes(CPU) == 50 * 1024
    (tmp_path / "memory.current").write_text("10000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) == 50 * 1024
    (tmp_path / "memory.max").write_text("15000\n")
    assert memory.free_bytes(CPU) == 5000
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert memory.free_bytes(CPU) == memory.FALLBACK_BYTES
