"""Programs that are run to be measured. Oracle: programs of a line, written here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rorqual.bench import processes
from rorqual.bench.processes import BenchError, find_program, run
from rorqual.ops.memory import peak_bytes

MEGABYTE = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program stays until its memory was looked at: each opens a pipe that the other holds."""
    held, ready, seen = 200 * MEGABYTE, tmp_path / "ready", tmp_path / "seen"
    os.mkfifo(ready)
    os.mkfifo(seen)
    code = f"x = b'1' * {held}; open({str(ready)!r}, 'w').close(); open({str(seen)!r}); print(3)"
    peaks: list[int | None] = []

    def looked(process_id: int) -> int | None:
        if not peaks:
            ready.open().close()
            peaks.append(peak_bytes(process_id))
            seen.open("w").close()
        return peaks[0]

    monkeypatch.setattr(processes, "peak_bytes", looked)
    ended = run("a program", python(code))
    assert (ended.out, ended.err) == ("3\n", "")
    assert ended.seconds > 0
    assert ended.peak_bytes == peaks[0]
    assert held < (ended.peak_bytes or 0) < held + 100 * MEGABYTE


def test_our_own_peak_does_not_fall() -> None:
    before = peak_bytes()
    assert before is not None
    held = bytes(50 * MEGABYTE)
    assert (peak_bytes() or 0) >= before
    del held
    assert peak_bytes(2**30) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; print('the reason', file=sys.stderr); sys.exit(3)", "the reason"),
        ("print('said here'); raise SystemExit(1)", "said here"),
        ("raise SystemExit(4)", "exit code 4"),
    ],
)
def test_a_failure_says_why(code: str, words: str) -> None:
    with pytest.raises(BenchError, match="the thing failed") as problem:
        run("the thing", python(code))
    assert words in str(problem.value)


def test_a_program_that_is_none() -> None:
    with pytest.raises(BenchError, match="the thing cannot be run: No such file"):
        run("the thing", ["/nowhere/at-all"])


def test_an_interrupt_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []

    def interrupted(process: subprocess.Popen[Any], seconds: float) -> None:
        started.append(process)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("a long one", python("import signal; signal.pause()"))
    assert started[0].returncode == -15


def test_where_programs_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("", "bin", "build/bin"):
        folder = tmp_path / (place or "here") / "x"
        program = folder / place / "tool"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert find_program(folder, "tool") == program
        assert find_program(program, "tool") == program
        assert find_program(folder, "other") is None
    monkeypatch.setenv("PATH", str(tmp_path / "here" / "x"))
    assert find_program(None, "tool") == tmp_path / "here" / "x" / "tool"
    assert find_program(None, "other") is None
