"""Programs that are measured: one at a time, each with its lines of output and the most memory it
had. Whatever ends us ends them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rorqual.errors import RorqualError
from rorqual.ops.memory import peak_bytes

LOOK_SECONDS = 0.05  # between two looks at its memory
GRACE_SECONDS = 5.0
SHOWN_LINES = 12  # of what a program said before it failed


class BenchError(RorqualError):
    """A program that was to be measured failed."""


@dataclass(frozen=True)
class Ended:
    """What a program left: what it said, how long it took, its peak memory if known."""

    out: str
    err: str
    seconds: float
    peak_bytes: int | None


def run(name: str, command: Sequence[str | os.PathLike[str]], folder: str | None = None) -> Ended:
    """Runs a program to its end, in this folder or that. BenchError, with the last that it said,
    where it fails.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder
            )
        except OSError as problem:
            raise BenchError(
                f"{name} cannot be run: {problem.strerror}", where=command[0]
            ) from None
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, peak_bytes(process.pid) or 0)
                _wait(process, LOOK_SECONDS)
        finally:
            _end(process)
        seconds = time.perf_counter() - began
        text, said = (_text(file) for file in (out, err))
        if process.returncode != 0:
            said = said or text
            raise BenchError(
                f"{name} failed",
                where=" ".join(map(str, command))[:500],
                found="\n            ".join(said.strip().splitlines()[-SHOWN_LINES:])
                or f"exit code {process.returncode}",
            )
        return Ended(text, said, seconds, peak or None)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def child(name: str, **asked: Any) -> list[str]:
    """The command that does one of the things of `bench/__main__.py`."""
    return [sys.executable, "-m", "rorqual.bench", name, json.dumps(asked)]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        _wait(process, GRACE_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()


def find_program(place: Path | None, name: str) -> Path | None:
    """A program in a folder, its `bin` or `build/bin`, or beside a file; without a place the one
    that a shell would find.
    """
    if place is None:
        found = shutil.which(name)
        return Path(found) if found else None
    folder = place.parent if place.is_file() else place
    for candidate in (folder, folder / "bin", folder / "build" / "bin"):
        if (candidate / name).is_file():
            return candidate / name
    return None
