"""What tests of packed weights share: a cache of their own, a small model, and what was said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed weights, which has no smallest size here."""
    from rorqual.weights import packed_cache

    monkeypatch.setenv("RORQUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was told since it was last asked."""
    caplog.set_level("INFO", logger="rorqual.weights")

    def told() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "rorqual.weights"]
        caplog.clear()
        return found

    return told


@pytest.fixture
def little(tmp_path: Path) -> Path:
    from test_packed_cache import LITTLE
    from test_stored import checkpoint

    return checkpoint("bfloat16", LITTLE, tmp_path)


@pytest.fixture
def not_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it refuses that a model's files are read from then on."""
    from rorqual.weights.stored_reader import _Reader

    def refuse(*_: object) -> None:
        raise AssertionError("the model's files are read")

    return lambda: monkeypatch.setattr(_Reader, "take", refuse)
