"""The slash commands of the terminal chat: what each does to the conversation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.engine import Conversation

Pieces = Generator[str, None, None]
_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)
NO_SYSTEM = "none"


@dataclass(frozen=True)
class Command:
    """`form` is what to type, `help` what it does. `is_alone`: it takes nothing after its name."""

    form: str
    help: str

    @property
    def name(self) -> str:
        return self.form.split()[0]

    @property
    def is_alone(self) -> bool:
        return self.form == self.name


COMMANDS = (
    Command("/retry", "answer the last message anew"),
    Command("/undo", "forget the last message and its answer"),
    Command("/clear", "forget the conversation and begin a new one"),
    Command("/system TEXT", "give the system text; alone shows it, `none` takes it away"),
    Command("/set NAME=VALUE", "change the sampling; alone lists it, NAME=default resets"),
    Command("/save FILE", "write the conversation, as JSON or (.md) as Markdown"),
    Command("/load FILE", "go on with a saved one, or one of the chat page"),
    Command("/help", "show this"),
    Command("/exit", "leave (so does Ctrl-D)"),
)
KEYS = """\
Ctrl-C stops an answer; at the prompt it clears the line. Alt-Enter, or a \\ at the end of a line,
begins another line of the message; a pasted text is one message. Tab completes a command, the
arrow keys bring earlier messages back."""


def help_text(*, is_terminal: bool) -> str:
    shown = COMMANDS if is_terminal else [c for c in COMMANDS if c.name not in ("/save", "/load")]
    lines = [f"{command.form:<17}{command.help}" for command in shown]
    return "\n".join([*lines, *([KEYS] if is_terminal else [])])


class Commands:
    """Does what the commands of one chat ask; `say` shows a line to whoever sits there.

    Files are written and read for a terminal only: what comes over a pipe may be anybody's text.
    """

    def __init__(
        self, conversation: Conversation, say: Callable[[str], object], *, is_terminal: bool
    ) -> None:
        self._conversation, self._say, self._is_terminal = conversation, say, is_terminal
        self._defaults = conversation.params
        self._file: Path | None = None  # the chat's own, which may be written again

    def answer_to(self, text: str) -> Pieces | None:
        """The answer to a message; None for a command that is done, and for nothing. UsageError for
        what cannot be answered or done.
        """
        found = _COMMAND.fullmatch(text)
        name = f"/{found[1]}" if found else ""
        command = next((known for known in COMMANDS if known.name == name), None)
        if command is None or found is None:
            if found is None or found[2] is not None:
                return self._conversation.ask(text) if text else None
            self._unknown(text)
            return None
        argument = (found[2] or "").strip()
        if command.is_alone and argument:
            raise UsageError(f"{name} takes nothing more", found=argument, fix=f"type {name} alone")
        does: Callable[[str], Pieces | None] = getattr(self, f"_{found[1]}")
        return does(argument)

    def _unknown(self, text: str) -> None:
        near = difflib.get_close_matches(text, [command.name for command in COMMANDS], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        self._say(f"There is no command {text}.{hint}\n{help_text(is_terminal=self._is_terminal)}")

    def _retry(self, _: str) -> Pieces | None:
        pieces = self._conversation.ask_again()
        if pieces is None:
            self._say("There is nothing to answer anew.")
        return pieces

    def _undo(self, _: str) -> None:
        message = self._conversation.undo()
        self._say(
            "There is nothing to undo." if message is None else f"Forgotten: {_in_short(message)}"
        )

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._file = None
        self._say("A new conversation begins.")

    def _system(self, text: str) -> None:
        if text == NO_SYSTEM:
            self._conversation.system = None
        elif text:
            self._conversation.system = text
        system = self._conversation.system
        self._say("There is no system text." if system is None else f"System text: {system}")

    def _set(self, text: str) -> None:
        from rorqual.cli.chat_settings import changed, listed, shown

        talk = self._conversation
        if text:
            talk.params = changed(text, talk.params, self._defaults, talk.num_ids)
            self._say(shown(text, talk.params))
        else:
            self._say(listed(talk.params, self._defaults))

    def _save(self, text: str) -> None:
        from rorqual.cli.chat_files import write_chat

        path = self._path_of("/save", text)
        if path.exists() and path != self._file:
            raise UsageError(
                "there is something of this name already", where=path, fix="choose another name"
            )
        if not self._conversation.messages:
            raise UsageError("there is nothing to save yet", fix="ask something first")
        write_chat(path, self._conversation.messages)
        self._file = path
        self._say(f"Saved in {path}.")

    def _load(self, text: str) -> None:
        from rorqual.cli.chat_files import read_chat

        path = self._path_of("/load", text)
        system, turns = read_chat(path)
        self._conversation.system, self._conversation.turns = system, turns
        self._file = path
        num = "1 turn" if len(turns) == 1 else f"{len(turns)} turns"
        last = " The last has no answer: /retry asks for it." if turns and not turns[-1][1] else ""
        self._say(f"Loaded {num} from {path}.{last}")

    def _path_of(self, command: str, text: str) -> Path:
        if not self._is_terminal:
            raise UsageError(f"{command} is for a terminal", fix="redirect the output to a file")
        if not text:
            raise UsageError(f"{command} needs a file", expected=f"{command} chat.json")
        return Path(text).expanduser().absolute()

    def _help(self, _: str) -> None:
        self._say(help_text(is_terminal=self._is_terminal))


def _in_short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"
