"""A conversation with whoever is at standard input: at a terminal, or over a pipe."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

from rorqual.errors import RorqualError

if TYPE_CHECKING:
    from rorqual.engine import Conversation
    from rorqual.weights import ModelFolder

PROMPT = "> "
HELP = """\
/clear  forget the conversation and begin a new one
/exit   leave (so does Ctrl-D)
/help   show this
Ctrl-C stops an answer; at the prompt it clears the line."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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
    import readline  # noqa: F401  gives `input` line editing and a history

    print(first_lines)
    prompt = _Prompt()
    before = signal.signal(signal.SIGINT, prompt.note_interrupt)
    try:
        while (text := prompt.read()) != "/exit":
            if not _is_command(conversation, text, print):
                _answer(conversation, text, show=printable)
    finally:
        signal.signal(signal.SIGINT, before)


class _Prompt:
    """Reads lines; Ctrl-C gives up the line and nothing else, whenever it comes."""

    def __init__(self) -> None:
        self._is_reading = False

    def note_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self._is_reading:
            self._is_reading = False  # one exception a line: none can escape from its handler
            raise KeyboardInterrupt

    def read(self) -> str:
        """The next line; an empty one for Ctrl-C, /exit at the end of input."""
        try:
            self._is_reading = True
            text = input(PROMPT).strip()
            self._is_reading = False
        except KeyboardInterrupt:
            text = ""
            print()
        except EOFError:
            self._is_reading = False
            text = "/exit"
            print()
        return text


def _answer_lines(conversation: Conversation) -> None:
    for line in sys.stdin:
        text = line.strip()
        if text == "/exit":
            return
        if not _is_command(conversation, text, _notice):
            _answer(conversation, text, show=str)


def _is_command(conversation: Conversation, text: str, say: Callable[[str], Any]) -> bool:
    """Does what an empty line or a line with a slash command asks; False for a message."""
    if text == "/clear":
        conversation.clear()
        say("A new conversation begins.")
    elif text == "/help":
        say(HELP)
    elif re.fullmatch(r"/\w+", text):
        say(f"There is no command {text}.\n{HELP}")
    else:
        return not text
    return True


def _answer(conversation: Conversation, text: str, show: Callable[[str], str]) -> None:
    """Streams an answer to standard output; in a terminal Ctrl-C ends it early.

    A message that cannot be answered is told to a terminal, and ends the program over a pipe.
    """
    is_terminal = sys.stdin.isatty()
    try:
        pieces = conversation.ask(text)
    except RorqualError as problem:
        if not is_terminal:
            raise
        _notice(str(problem))
        return
    if num_dropped := conversation.num_dropped_turns:
        turns = "the oldest turn" if num_dropped == 1 else f"the {num_dropped} oldest turns"
        _notice(f"[The conversation outgrew the model's context: {turns} forgotten.]")
    with closing(pieces), _interruptible(is_terminal) as is_interrupted:
        for piece in pieces:
            print(show(piece), end="", flush=True)
            if is_interrupted():
                print(" [stopped]", end="")
                break
    print(flush=True)


def _interruptible(is_wanted: bool) -> AbstractContextManager[Callable[[], bool]]:
    """Lets Ctrl-C, if wanted, set what is yielded instead of raising; a second one raises."""
    from rorqual.engine.interrupts import noted

    if not is_wanted:
        return nullcontext(lambda: False)
    return noted(signal.SIGINT, signal.default_int_handler)


def printable(text: str) -> str:
    """Control characters made visible, so that no answer can steer the terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _notice(text: str) -> None:
    """A line for the person, never part of the answers."""
    print(text, file=sys.stderr, flush=True)
