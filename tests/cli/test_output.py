"""What a command does when its output cannot be written: as the programs of a Unix shell.

Oracle: `141`, what a shell reports of a program that SIGPIPE ended, without a word; for a full disk
a message and a code that is not 0. A pipe that nobody reads fails at the first flush, whatever the
order of events; a listing longer than a pipe holds cannot be over before `head` is.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command import ENVIRONMENT, start

from patience import HANG_SECONDS
from rorqual.cli.exits import EXIT_BAD_INPUT
from rorqual.cli.verbs import run

PIPE_BYTES = 1 << 16
PROGRAM = [sys.executable, "-m", "rorqual"]
VERBS = [
    ["--help"],
    ["--version"],
    ["inspect", "--help"],
    ["data", "list"],
    ["plan", "671b", "--on", "8xH200"],
    ["inspect", "tiny-folder", "--tensors"],
    ["inspect", "tiny-folder", "--tensors", "--json"],
    ["generate", "--model", "tiny-folder", "--prompt", "The", "--max-new-tokens", "2"],
]
QUICK = VERBS[:2]
"""One of each way to print; the others are slow to start and take the same way."""


def verbs() -> list[Any]:
    slow = pytest.mark.slow
    quick = [*QUICK, VERBS[3], VERBS[5]]
    return [pytest.param(v, id=" ".join(v), marks=() if v in quick else slow) for v in VERBS]


def program(verb: list[str], folder: Path) -> list[str]:
    return [*PROGRAM, *[str(folder) if part == "tiny-folder" else part for part in verb]]


def run_into(output: int | str, command: list[str]) -> tuple[int, str]:
    """(exit code, what it said on standard error)."""
    descriptor = os.open(output, os.O_WRONLY) if isinstance(output, str) else output
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            timeout=HANG_SECONDS,
            check=False,
        )
    finally:
        os.close(descriptor)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("verb", verbs())
def test_a_reader_that_has_gone(verb: list[str], model_folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert run_into(writing, program(verb, model_folder)) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("verb", verbs())
def test_a_full_disk(verb: list[str], model_folder: Path) -> None:
    code, said = run_into("/dev/full", program(verb, model_folder))
    assert code == 2
    assert said.startswith("rorqual: ")
    assert "No space left on device" in said
    assert "the disk is full" in said.splitlines()[0]
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", QUICK)
def test_an_output_that_was_closed_before(verb: list[str], model_folder: Path) -> None:
    command = shlex.join(program(verb, model_folder)) + " >&-"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_head_takes_the_first_line_of_a_long_listing(
    tmp_path: Path, flags: list[str], unbuffered: str
) -> None:
    path = tmp_path / "many.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for number in range(2 * PIPE_BYTES // 60):
        writer.add_tensor(f"blk.{number}.a_tensor_with_a_long_name.weight", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    listing = shlex.join([*PROGRAM, "inspect", str(path), "--tensors", *flags])
    script = f"set -o pipefail; {listing} | head -1; echo ${{PIPESTATUS[0]}}"
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    first, code = done.stdout.splitlines()
    assert first == ("{" if flags else f"{path} (GGUF)")
    assert (code, done.stderr) == ("141", "")


def test_interrupted_output_is_whole_otherwise(model_folder: Path) -> None:
    """What could be written before another fault is not lost with it."""
    with start("generate", "--model", model_folder, "--prompt", "The", "--top-p", "7") as program:
        out, err = program.communicate(timeout=HANG_SECONDS)
    assert (program.returncode, out) == (2, b"")
    assert b"top_p" in err


class Full(io.StringIO):
    """Standard error on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "the disk is full")


def test_an_error_that_cannot_be_told_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(sys, "argv", ["rorqual", "inspect", "no-such-model"])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == EXIT_BAD_INPUT
