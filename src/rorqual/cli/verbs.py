"""The command `rorqual`: finds the verb, imports only that, and turns errors into messages.

`rorqual --help` lists the verbs from the table below without importing any; a verb's module must
import torch and the like inside its function, so that `rorqual VERB --help` is quick too.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from rorqual.cli.exits import (
    DEBUG_FLAG,
    EXIT_BAD_INPUT,
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    INTERRUPTED,
)
from rorqual.errors import RorqualError
from rorqual.files import explained
from rorqual.log import PrintableFormatter, printable


@dataclass(frozen=True)
class Verb:
    """Where a command lives (`module:function` or `module:typer app`), and its line in the list."""

    place: str
    help: str


VERBS = {
    "chat": Verb("rorqual.cli.chat:chat", "Talk with a model in the terminal."),
    "generate": Verb("rorqual.cli.generate:generate", "Continue prompts: one, or a whole file."),
    "serve": Verb("rorqual.cli.serve:serve", "Serve a model: OpenAI's API and a chat page."),
    "inspect": Verb("rorqual.cli.inspect:inspect", "Show and check a model's shapes and sizes."),
    "eval": Verb("rorqual.cli.eval:evaluate", "Measure tasks and bits per byte."),
    "train": Verb("rorqual.cli.train:train", "Train a model as a recipe says."),
    "report": Verb("rorqual.cli.report:report", "Show a training run as one HTML page."),
    "convert": Verb("rorqual.cli.convert:convert", "Convert between FP8, BF16, shards and GGUF."),
    "plan": Verb("rorqual.cli.plan:plan", "Plan memory, speed and disk before loading."),
    "pipeline": Verb("rorqual.cli.pipeline:pipeline", "Simulate and draw pipeline orders."),
    "bench": Verb(
        "rorqual.cli.bench:bench", "Measure this machine, and engines beside its limits."
    ),
    "demo-generate": Verb(
        "rorqual.cli.demo_generate:demo_generate", "Generate with the flags of DeepSeek's demo."
    ),
    "data": Verb("rorqual.cli.data:app", "Fetch corpora and build token shards."),
    "cache": Verb("rorqual.cli.cache:app", "List, check, remove packed weights that are kept."),
}


class LazyGroup(TyperGroup):
    """Lists the verbs without importing them; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return None if verb is None else TyperCommand(cmd_name, help=verb.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        near = difflib.get_close_matches(args[0], VERBS, n=1)
        if near and args[0] not in VERBS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _load(name), rest

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Here `--help` and `--version` are printed."""
        with _faults_told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; the user's faults become a message and an exit code."""
        with _faults_told(is_debug=ctx.params["debug"]):
            return super().invoke(ctx)


@contextmanager
def _faults_told(*, is_debug: bool = False) -> Iterator[None]:
    try:
        try:
            yield
        except typer.Exit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a failure to write must be told, and must change the exit code
    except BrokenPipeError:
        # What reads us has gone, as in `rorqual ... | head`.
        _give_up_output()
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except (RorqualError, OSError) as problem:  # OSError: a full disk, a folder without permission
        _give_up_output()
        if is_debug:
            raise
        _tell(f"rorqual: {explained(problem) if isinstance(problem, OSError) else problem}")
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        if is_debug:
            raise
        _tell(INTERRUPTED)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _tell(message: str) -> None:
    """Where nothing can be told, since the disk under standard error is full, the exit code is."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr)


def _give_up_output() -> None:
    """Lets go of what cannot be written to standard output: the flush at exit must not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load(name: str) -> Any:
    """The real command behind a verb."""
    module, _, attribute = VERBS[name].place.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=name)
    else:
        app.callback()(lambda: None)  # so that a single command stays a command of a group
        app.command(name)(target)
    return get_group(app).commands[name]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import rorqual

        print(f"rorqual {rorqual.__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG_FLAG, help="Show Python's traceback for any error.")
    ] = False,
) -> None:
    """All of DeepSeek-V3, open end to end: from raw text to a served model.

    \b
    Examples:
      rorqual chat
      rorqual generate --model DIR --prompt "The whale"
      rorqual serve --port 8000
      rorqual inspect 671b
      rorqual train recipes/tiny.toml
    """
    # The libraries below us are only of interest when they warn.
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rorqual").setLevel(logging.DEBUG if debug else logging.INFO)


def _buffered(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same output with a buffer, flushed at each line. Without one (PYTHONUNBUFFERED) Python
    takes a write that was cut short, by a full disk or a reader that went, for a whole one.
    """
    return open(stream.fileno(), "w", 1, encoding=stream.encoding, errors="replace", closefd=False)


def run() -> None:
    """Runs what the arguments say; ends with SystemExit."""
    app = typer.Typer(
        cls=LazyGroup, add_completion=False, rich_markup_mode=None, no_args_is_help=True
    )
    app.callback()(_options)
    if sys.stdout is None:  # closed before we began, as by `>&-`; Python prints nothing then
        print("rorqual: standard output is closed\n  fix:      >/dev/null", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and goes on
        if isinstance(sys.stdout.buffer, io.RawIOBase):
            sys.stdout = _buffered(sys.stdout)
    args = sys.argv[1:]
    options = args[: args.index("--")] if "--" in args else args
    if DEBUG_FLAG in options:
        args.remove(DEBUG_FLAG)
        args.insert(0, DEBUG_FLAG)
    get_command(app).main(args, prog_name="rorqual")
