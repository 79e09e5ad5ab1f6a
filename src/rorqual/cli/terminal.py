"""A conversation with whoever is at standard input: at a terminal, or over a pipe."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from rorqual.cli.chat_commands import COMMANDS, Commands, Pieces
from rorqual.errors import RorqualError
from rorqual.log import printable

if TYPE_CHECKING:
    from rorqual.engine import Conversation
    from rorqual.weights import ModelFolder

EXIT = "/exit"


def opening(folder: ModelFolder) -> str:
    """The lines that begin a chat: the model, what it can do, how to leave."""
    card = folder.card()
    lines = [card.opening or f"This is {folder.name}."]
    lines += [f"  Try: {example}" for example in card.examples]
    return "\n".join([*lines, "/help shows the commands, /exit leaves."])


def converse(conversation: Conversation, first_lines: str) -> None:
    """A dialogue with whoever is at standard input, until it ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte ends no conversation
    if sys.stdin.isatty():
        _converse_in_terminal(conversation, first_lines)
    else:
        _answer_lines(conversation)


def _converse_in_terminal(conversation: Conversation, first_lines: str) -> None:
    from rorqual.cli.prompt import Prompt, history_file
    from rorqual.engine.interrupts import noted

    # Where answers go to a file, all else is still for the person.
    say: Callable[[str], None] = print if sys.stdout.isatty() else _notice
    say(printable(first_lines))
    prompt = Prompt([command.name for command in COMMANDS], history_file())
    commands = Commands(conversation, lambda text: say(printable(text)), is_terminal=True)
    # Between a prompt and an answer Ctrl-C has nothing to stop.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        while (text := prompt.read()) not in (None, EXIT):
            assert text is not None
            try:
                # From here on: what comes while a prompt is made stops its answer.
                with noted(signal.SIGINT, signal.default_int_handler) as is_interrupted:
                    if (pieces := commands.answer_to(text)) is not None:
                        say(_show(conversation, pieces, is_interrupted))
            except RorqualError as problem:
                _notice(printable(str(problem)))
    finally:
        signal.signal(signal.SIGINT, before)


def _answer_lines(conversation: Conversation) -> None:
    """A message or a command that cannot be done ends the program."""
    commands = Commands(conversation, _notice, is_terminal=False)
    for line in sys.stdin:
        text = line.strip()
        if text == EXIT:
            return
        if (pieces := commands.answer_to(text)) is not None:
            _tell_dropped(conversation)
            with closing(pieces):
                for piece in pieces:
                    print(shown(piece), end="", flush=True)
            print(flush=True)


def _show(conversation: Conversation, pieces: Pieces, is_interrupted: Callable[[], bool]) -> str:
    """Streams an answer to standard output, until it is interrupted; what it took."""
    _tell_dropped(conversation)
    began = time.perf_counter()
    first: float | None = None
    with closing(pieces):
        for piece in pieces:
            first = first or time.perf_counter()
            print(printable(piece), end="", flush=True)
            if is_interrupted():
                print(" [stopped]", end="")
                break
    ended = time.perf_counter()
    print(flush=True)
    first = first or ended
    return _speed(conversation, first - began, ended - first)


def _tell_dropped(conversation: Conversation) -> None:
    if num_dropped := conversation.num_dropped_turns:
        turns = "the oldest turn" if num_dropped == 1 else f"the {num_dropped} oldest turns"
        _notice(f"[The conversation outgrew the model's context: {turns} forgotten.]")


def _speed(conversation: Conversation, first_seconds: float, other_seconds: float) -> str:
    """Of the tokens after the first, which waited for the prompt."""
    num_tokens = conversation.usage.num_output_tokens if conversation.usage else 0
    tokens = "1 token" if num_tokens == 1 else f"{num_tokens} tokens"
    has_rate = num_tokens > 1 and other_seconds > 0
    rate = f", {(num_tokens - 1) / other_seconds:.1f} tokens/s" if has_rate else ""
    return f"[{tokens}{rate}, first after {first_seconds:.2f} s]"


def shown(text: str) -> str:
    """An answer as standard output gets it: as it is, but at a terminal nothing that steers it."""
    return printable(text) if sys.stdout.isatty() else text


def _notice(text: str) -> None:
    """A line for the person, never part of the answers."""
    print(text, file=sys.stderr, flush=True)
