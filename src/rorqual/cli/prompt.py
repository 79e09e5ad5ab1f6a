"""The prompt of the terminal chat: several lines, a history in a file, completion of commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from rorqual.errors import UsageError
from rorqual.files import state_folder

PROMPT, CONTINUED = "> ", ". "
HISTORY_FILE = "chat_history"
MAX_ENTRIES = 1000


class Prompt:
    """Reads messages; Ctrl-C gives up the one that is being written and nothing else."""

    def __init__(self, commands: Sequence[str], history: Path | None) -> None:
        # Prompts stand where a person reads, answers where standard output goes.
        output = None if sys.stdout.isatty() else create_output(sys.stderr)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=lambda *_: CONTINUED,
            history=None if history is None else FileHistory(history),
            completer=Commands(commands),
            complete_while_typing=False,
            key_bindings=_keys(),
            output=output,
        )

    def read(self) -> str | None:
        """The next message, stripped; "" for Ctrl-C, None at the end of input."""
        try:
            return _as_text(self._session.prompt()).strip()
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None


def _as_text(typed: str) -> str:
    """Bytes that are no UTF-8 come as surrogates, which nothing can encode."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class FileHistory(History):
    """What was typed, a JSON string a line, in a file that only this user reads.

    A file that cannot be used is as good as none.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """The newest first; of a long file the older half is given up."""
        with suppress(OSError, ValueError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines()
            if len(lines) > 2 * MAX_ENTRIES:
                lines = lines[-MAX_ENTRIES:]
                shorter = self._path.with_name(f"{self._path.name}.new")
                _write(shorter, "".join(f"{line}\n" for line in lines), os.O_TRUNC)
                shorter.replace(self._path)
            return reversed([*_entries(lines)])
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            _write(self._path, json.dumps(string) + "\n", os.O_APPEND)


def history_file() -> Path | None:
    """In this user's state folder; None for a user without a home."""
    with suppress(UsageError):
        return state_folder("set HOME") / HISTORY_FILE
    return None


def _write(path: Path, text: str, how: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.chmod(path, 0o600)  # also of a file that another program made
        file.write(text)


def _entries(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        with suppress(ValueError):
            if isinstance(entry := json.loads(line), str):
                yield entry


class Commands(Completer):
    """The names of commands that begin as the line does."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text = document.text
        for name in self._names:
            if text.startswith("/") and name.startswith(text):
                yield Completion(name, start_position=-len(text))


def _keys() -> KeyBindings:
    """Enter sends, and after a backslash goes on in the next line, as Alt-Enter always does."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
