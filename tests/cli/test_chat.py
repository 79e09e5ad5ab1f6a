"""The chat over a pipe and in a pseudo-terminal. Oracle: the same conversation in process."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ENVIRONMENT, heed_interrupts, run, start

from patience import HANG_SECONDS
from rorqual.cli.terminal import printable
from rorqual.engine import Conversation, Engine, SamplingParams
from rorqual.weights import ModelFolder

pytestmark = pytest.mark.concurrency


def expected(model_folder: Path, max_tokens: int, *messages: str) -> list[str]:
    folder = ModelFolder.find(str(model_folder))
    engine = Engine(folder.load_model(), folder.load_tokenizer())
    talk = Conversation(engine, SamplingParams(**folder.sampling(max_tokens=max_tokens)))
    return ["".join(talk.ask(message)) for message in messages]


def test_piped_lines_are_turns_of_one_conversation(model_folder: Path) -> None:
    lines = "hello\n\nsing\n/clear\nhello\n/help\n/exit\nnever answered\n"
    done = run("chat", "--model", model_folder, "--max-new-tokens", 12, input=lines)
    assert done.code == 0
    first, second = expected(model_folder, 12, "hello", "sing")
    assert done.out == f"{first}\n{second}\n{first}\n"  # nothing but answers
    assert "/clear" in done.err


def test_end_of_input_is_the_end(model_folder: Path) -> None:
    done = run("chat", "--model", model_folder, input="")
    assert (done.code, done.out) == (0, "")


def test_a_system_text_and_flags_change_the_answer(model_folder: Path) -> None:
    flags = ("chat", "--model", model_folder, "--max-new-tokens", 12)
    plain = run(*flags, input="hello\n").out
    assert run(*flags, "--system", "Sing.", input="hello\n").out != plain
    hot = (*flags, "--temperature", 1, "--top-p", 0.9, "--top-k", 50, "--seed", 4)
    assert run(*hot, input="hello\n").out == run(*hot, input="hello\n").out != plain


@pytest.mark.parametrize(
    "flags", [("--temperature", "-1"), ("--dtype", "int4"), ("--threads", "0"), ("--top-p", "x")]
)
def test_bad_flags_are_2(model_folder: Path, flags: tuple[str, ...]) -> None:
    done = run("chat", "--model", model_folder, *flags, input="hello\n")
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err


def test_a_message_beyond_the_context_is_told(model_folder: Path) -> None:
    done = run("chat", "--model", model_folder, input="x1" * 9000 + "\n")
    assert done.code == 2
    assert "does not fit" in done.err


def test_control_characters_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x9be🐳") == "a\\x1b[2Jb\tc\nd\\x9be🐳"


class Terminal:
    """`rorqual chat` in a pseudo-terminal of its own session, so that Ctrl-C reaches it."""

    def __init__(self, model_folder: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            heed_interrupts()
            command = [sys.executable, "-m", "rorqual", "chat", "--model", str(model_folder)]
            os.execve(sys.executable, command, ENVIRONMENT | {"TERM": "dumb"})
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def expect(self, pattern: str) -> str:
        """Reads until the pattern appears; returns what came up to its end."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[-500:]!r}"
            if select.select([self.descriptor], [], [], 1.0)[0]:
                self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def interrupt_until(self, pattern: str) -> None:
        """Presses Ctrl-C as a person would: again, if nothing happens.

        Python loses a signal that comes between readline's last check and its `select`.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while not re.search(pattern, self.seen, re.DOTALL):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[-500:]!r}"
            self.send("\x03")
            # Its echo comes before what it does: a second press now would hit the next line.
            while select.select([self.descriptor], [], [], 5.0)[0]:
                self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
                if re.search(pattern, self.seen, re.DOTALL):
                    break
        self.seen = ""

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(model_folder: Path) -> Iterator[Terminal]:
    started = Terminal(model_folder)
    yield started
    try:
        os.kill(started.pid, signal.SIGKILL)
        os.waitpid(started.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it has ended by itself
    os.close(started.descriptor)


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    opening = terminal.expect("> ")
    assert "I am Sei." in opening
    assert "Try: sing" in opening
    terminal.send("hello\n")
    terminal.expect("hello\r\n.+")  # its echo, and the first text of an answer of 8,000 tokens
    terminal.send("\x03")
    terminal.expect(r"\[stopped\]\r\n> ")
    terminal.send("half a line")
    terminal.expect("half a line")
    terminal.interrupt_until("\r\n> ")
    terminal.send("/clear\n")
    terminal.expect("A new conversation begins.\r\n> ")
    terminal.send("/sing\n")
    terminal.expect("There is no command /sing")
    terminal.expect("\n> ")
    terminal.send("\x04")
    assert terminal.exit_code() == 0


def test_a_broken_pipe_is_quiet(model_folder: Path) -> None:
    chat = start("chat", "--model", model_folder)
    assert chat.stdin
    assert chat.stdout
    assert chat.stderr
    chat.stdin.write(b"hello\n")
    chat.stdin.close()
    assert chat.stdout.read(1)
    chat.stdout.close()
    assert chat.wait(HANG_SECONDS) == 141
    assert chat.stderr.read() == b""
    chat.stderr.close()
