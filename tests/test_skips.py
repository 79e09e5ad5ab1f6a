"""The end of a run tells what was not tested. Oracle: a run of its own over files that skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patience import HANG_SECONDS
from skips import LACKS, STRICT, lack_of

TESTS = Path(__file__).parent
SKIPPING = """
import pytest
@pytest.mark.skipif(True, reason="no browser found: looked for chromium")
@pytest.mark.parametrize("number", range(3))
def test_page(number): pass
def test_disk(): pytest.skip("cannot mount a small disk: permission denied")
def test_good(): pass
"""
WHOLE = "import pytest\npytest.importorskip('no_such_module', reason='an odd reason')\n"


def run(folder: Path, *flags: str, is_strict: bool = False) -> tuple[int, str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "200"}
    environment.pop(STRICT, None)
    if is_strict:
        environment[STRICT] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-q", *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("flags", [("-n0",), pytest.param(("-n2",), marks=pytest.mark.slow)])
def test_skips_are_grouped_with_what_helps(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Also whole files, and also from other processes."""
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_whole.py").write_text(WHOLE)
    code, told = run(tmp_path, *flags)
    assert code == 0, told
    told = told.split("not tested here")[1]
    assert "3 tests of test_some.py: no browser found" in told
    assert "to run them: sudo apt-get install chromium" in told
    assert "1 tests of test_some.py: cannot mount a small disk" in told
    assert "all tests of test_whole.py: an odd reason" in told
    code, told = run(tmp_path, *flags, is_strict=True)
    assert code == 1
    assert told.count("NOT ALLOWED") == 2, told


def test_a_strict_run_allows_what_is_listed(tmp_path: Path) -> None:
    text = SKIPPING.replace("no browser found", "no /proc")
    (tmp_path / "test_some.py").write_text(text)
    code, told = run(tmp_path, "-n0", is_strict=True)
    assert code == 0, told
    assert "NOT ALLOWED" not in told


def test_a_run_without_skips_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_good(): pass\n")
    code, told = run(tmp_path, "-n0", is_strict=True)
    assert code == 0
    assert "not tested here" not in told


def test_every_lack_is_found_by_its_own_words() -> None:
    assert lack_of("whatever") is None
    for words in ("no browser found: chromium", "no C++ compiler built them"):
        lack = lack_of(words)
        assert lack is not None
        assert lack.may_lack is None, "CI has it"
    assert all(lack.remedy for lack in LACKS)
