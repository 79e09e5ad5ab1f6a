"""The file that `rorqual generate --output-file` writes: whole or absent, one process's at a time.

While answers come they lie in `G.jsonl.partial`. What an interruption leaves there stays, and no
later run removes it: whoever asked decides what it is worth.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rorqual.cli.exits import ended_by_sigterm
from rorqual.errors import UsageError
from rorqual.files import fsync_path
from rorqual.locks import FileLock
from rorqual.log import console

BUSY = "another process writes its answers here"


@dataclass(frozen=True)
class AnswerFile:
    """A file that this process alone may write."""

    path: Path

    @classmethod
    @contextmanager
    def taken(cls, path: Path | None) -> Iterator[AnswerFile | None]:
        """The file, before anything is loaded; None if none is wanted. UsageError if another
        process writes it, or if answers of an interrupted run would be lost.
        """
        if path is None:
            yield None
            return
        fix = "or choose another --output-file"
        with FileLock(path.with_name(f".{path.name}.lock"), BUSY, where=path, fix=fix):
            file = cls(path)
            if num_left := file._num_left():
                raise UsageError(
                    "holds what an interrupted run has answered",
                    where=file.partial,
                    found=f"{num_left} answers",
                    fix="rename it to keep them, or remove it, and run the command again",
                )
            yield file

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def write(self, lines: Iterable[str], num_lines: int) -> None:
        """Writes line by line, then gives the name; what an interruption leaves is told."""
        try:
            with ended_by_sigterm():
                with self.partial.open("w", encoding="utf-8") as file:
                    for line in lines:
                        file.write(line + "\n")
                        file.flush()
                    os.fsync(file.fileno())
                os.replace(self.partial, self.path)
                fsync_path(self.path.parent)
        except BaseException:
            self._tell_what_is_left(num_lines)
            raise
        console().print(f"{num_lines} answers are in {self.path}")

    def _num_left(self) -> int:
        """Counts the file's own whole lines: an interruption comes between any two instructions."""
        if not self.partial.exists():
            return 0
        with self.partial.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def _tell_what_is_left(self, num_lines: int) -> None:
        if num_written := self._num_left():
            console().print(f"{num_written} of {num_lines} answers are in {self.partial}")
        else:
            self.partial.unlink(missing_ok=True)
