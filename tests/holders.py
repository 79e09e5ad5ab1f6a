"""Programs that hold a lock until they are killed, for tests of who may come second.

    python holders.py FOLDER          takes FolderLock(FOLDER)
    python holders.py FOLDER child    the same, and so do a forked child and a started program

says "held" (then the ids of what it started) and sleeps.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOREVER_SECONDS = 600.0


@contextmanager
def started(command: list[str], said: str, folder: Path | None = None) -> Iterator[list[str]]:
    """A program that has said a line beginning with `said`; yields its words. Killed at the end.

    The id of the process is the last word. Its input stays open.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder) as program:
        assert program.stdout is not None
        try:
            for line in program.stdout:
                if line.startswith(said):
                    yield [*line.split(), str(program.pid)]
                    return
            raise AssertionError(f"{command} ended without saying {said!r}")
        finally:
            program.kill()


def holder(folder: Path, *words: str) -> list[str]:
    return [sys.executable, __file__, str(folder), *words]


def main() -> None:
    from rorqual.locks import FolderLock

    with FolderLock(sys.argv[1], "held by another"):
        children = []
        if "child" in sys.argv:
            # What is inherited unless something is done about it, as by a loader's workers.
            sleep = [sys.executable, "-c", f"import time; time.sleep({FOREVER_SECONDS})"]
            children.append(subprocess.Popen(sleep, close_fds=False, stdout=subprocess.DEVNULL).pid)
            begun, begins = os.pipe()
            if (child := os.fork()) == 0:
                os.close(1)
                os.write(begins, b".")  # its hooks have run: it does not hold the lock any more
                time.sleep(FOREVER_SECONDS)
                os._exit(0)
            os.read(begun, 1)
            children.append(child)
        print("held", *children, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
