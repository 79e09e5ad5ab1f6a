"""Ways to run the command: in this process (quick), or as a program of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import forked
from in_process import Done, run

__all__ = ["Done", "run", "start"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: object, setup: str = "") -> subprocess.Popen[bytes]:
    """Starts the program with pipes on all three sides. `setup` is Python that it runs first, in an
    interpreter that has imported nothing.
    """
    pipe = subprocess.PIPE
    if not setup:
        command = [sys.executable, "-m", "rorqual", *map(str, arguments)]
        return forked.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT)
    main = f"{setup}\nfrom rorqual.cli.main import main\nmain()"
    command = [sys.executable, "-c", main, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT, preexec_fn=heed_interrupts
    )


def heed_interrupts() -> None:
    """A shell's background job inherits an ignored SIGINT; a program in a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
