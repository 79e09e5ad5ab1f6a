"""Runs the command in this process: a start of Python and torch costs seconds."""

from __future__ import annotations

import io
import os
import sys
from contextlib import chdir, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from rorqual.cli.main import main


class Done(NamedTuple):
    """What a command left behind."""

    code: object
    out: str
    err: str


def run(*arguments: object, input: str = "", folder: Path | None = None, **variables: str) -> Done:
    """Runs `main` here with standard input piped from `input`, in `folder`, with these variables
    of the environment.
    """
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    piped = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
    code: object = None
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["rorqual", *map(str, arguments)]),
        patch.object(sys, "stdin", piped),
        patch.dict(os.environ, variables),
        chdir(folder) if folder else nullcontext(),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Done(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()
