"""The benchmark of neighbours runs; its bars are for a machine that does nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from patience import HANG_SECONDS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_neighbours.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quick"], ["alone", "schema of 6,000", "twelve prompts", "two n=128", "200 streams"]),
        (["--load", "--seconds", "5", "--workers", "40"], ["blocks lost: 0; faults: 0"]),
    ],
)
def test_the_benchmark_runs(flags: list[str], words: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode in (0, 1), done.stderr
    for word in words:
        assert word in done.stdout, done.stdout + done.stderr
