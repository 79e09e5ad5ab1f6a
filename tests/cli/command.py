"""Ways to run the command: in this process (quick), or as a program of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from rorqual.cli.main import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Done(NamedTuple):
    """What a command left behind."""

    code: object
    out: str
    err: str


def run(*arguments: object, input: str = "") -> Done:
    """Runs `main` here with standard input piped from `input`."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    piped = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
    argv = ["rorqual", *map(str, arguments)]
    code: object = None
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", piped),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Done(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def start(*arguments: object, setup: str = "") -> subprocess.Popen[bytes]:
    """Starts the program with pipes on all three sides; `setup` is Python that it runs first."""
    main = (
        ["-c", f"{setup}\nfrom rorqual.cli.main import main\nmain()"]
        if setup
        else ["-m", "rorqual"]
    )
    command = [sys.executable, *main, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT, preexec_fn=heed_interrupts
    )


def heed_interrupts() -> None:
    """A shell's background job inherits an ignored SIGINT; a program in a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
