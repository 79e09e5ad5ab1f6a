"""A forked program is one as `subprocess` starts it. Oracle: subprocess.Popen of the same words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forked
from patience import HANG_SECONDS

pytestmark = pytest.mark.concurrency
SAYS = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["WHALE"], sys.stdin.read(), __name__)
print("and this", file=sys.stderr)
os.write(2, b"to the end")
"""
ENDS = {
    "of itself": "",
    "a code": "raise SystemExit(7)",
    "words": "raise SystemExit('no')",
    "an error": "1 / 0",
    "its own kill": "import os; os.kill(os.getpid(), 9)",
    "an interrupt": "raise KeyboardInterrupt",
    "an exit handler": "import atexit; atexit.register(print, 'bye')",
}


def result(kind: Any, folder: Path, *words: str, text: str = "") -> tuple[int, str, str]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "WHALE": "blue"}
    with kind(
        [sys.executable, *words],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=folder,
        env=environment,
    ) as program:
        out, err = program.communicate(text, timeout=HANG_SECONDS)
    return program.returncode, out, err.splitlines()[-1] if err else ""


def test_words_pipes_folder_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(SAYS)
    for words in (["-c", SAYS, "a", "b"], [str(file), "a"], ["-m", "program", "c"]):
        found = result(forked.Popen, tmp_path, *words, text="grün")
        assert found == result(subprocess.Popen, tmp_path, *words, text="grün")


@pytest.mark.parametrize("code", ENDS.values(), ids=list(ENDS))
def test_ends(code: str, tmp_path: Path) -> None:
    words = ["-c", code]
    assert result(forked.Popen, tmp_path, *words) == result(subprocess.Popen, tmp_path, *words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it_and_tell_its_end(number: signal.Signals) -> None:
    code = "import sys; print('here', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with forked.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"here\n"
        assert program.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(timeout=0)
        program.send_signal(number)
        assert program.wait(timeout=HANG_SECONDS) == program.poll() == -number


def test_two_at_once_and_the_command() -> None:
    first = forked.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert forked.run("-m", "rorqual", "--version", timeout=HANG_SECONDS).stdout.startswith(b"ror")
    first.communicate(b"\n", timeout=HANG_SECONDS)
    assert first.returncode == 0


def test_a_file_that_was_given_stays_open(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        command = [sys.executable, "-c", "print('here')"]
        with forked.Popen(command, stdin=subprocess.DEVNULL, stdout=file) as program:
            assert program.wait(timeout=HANG_SECONDS) == 0
        print("and there", file=file)
    assert (tmp_path / "out").read_text() == "here\nand there\n"
