"""The chat over a pipe and in a pseudo-terminal. Oracle: the same conversation in process."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ENVIRONMENT, heed_interrupts, run, start

from patience import HANG_SECONDS
from rorqual.cli.terminal import shown
from rorqual.engine import Conversation, Engine, SamplingParams
from rorqual.log import printable
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


def test_commands_over_a_pipe(model_folder: Path, tmp_path: Path) -> None:
    """The same without a terminal: answers alone on standard output, and no file is touched."""
    first, second = expected(model_folder, 4, "hello", "sing")
    lines = (
        "/set max_tokens=4\nhello\nsing\n/retry\n/undo\n/undo\n/undo\nhello\n/system Sing.\n/set\n"
    )
    done = run("chat", "--model", model_folder, input=lines)
    assert (done.code, done.out) == (0, f"{first}\n{second}\n{second}\n{first}\n")
    assert "nothing to undo" in done.err
    assert "System text: Sing." in done.err
    assert "max_tokens = 4 " in done.err
    assert "\x1b" not in done.out + done.err
    assert "tokens/s" not in done.out + done.err
    for line in (f"/save {tmp_path}/a", f"/load {tmp_path}/a", "/set top_p=7", "/set x=1"):
        done = run("chat", "--model", model_folder, input=f"{line}\nhello\n")
        assert (done.code, done.out) == (2, ""), line
    assert list(tmp_path.iterdir()) == []


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


def test_an_answer_is_as_it_is_but_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "a\x1b[2Jb\u202ec"
    for is_terminal, expected in ((False, answer), (True, "a\\x1b[2Jb\\u202ec")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda found=is_terminal: found)
        assert shown(answer) == expected


def test_a_message_about_a_name_steers_nothing() -> None:
    done = run("inspect", "no\x1b[2Jmodel\u202e")
    assert done.code == 2
    assert "no\\x1b[2Jmodel\\u202e" in done.err
    assert "\x1b" not in done.err


PROMPT = ">[ \x08]"  # of which a terminal is told to skip the space
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`rorqual chat` in a pseudo-terminal of its own session, so that Ctrl-C reaches it.

    `seen` is what came, without the codes that steer a terminal.
    """

    def __init__(
        self, model_folder: Path, home: Path, kind: str = "xterm", out: Path | None = None
    ) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            heed_interrupts()
            if out is not None:
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            command = [sys.executable, "-m", "rorqual", "chat", "--model", str(model_folder)]
            # Nobody answers here when a program asks where the cursor is.
            own = {"TERM": kind, "XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execve(sys.executable, command, ENVIRONMENT | own)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read(self) -> None:
        self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
        self.seen = CODES.sub("", self.seen)

    def expect(self, pattern: str) -> str:
        """Reads until the pattern appears; returns what came up to its end."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[-500:]!r}"
            if select.select([self.descriptor], [], [], 1.0)[0]:
                self.read()
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def interrupt_until(self, pattern: str) -> None:
        """Presses Ctrl-C as a person would: again, if nothing happens.

        Between an answer and the prompt it has nothing to stop.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while not re.search(pattern, self.seen, re.DOTALL):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[-500:]!r}"
            self.send("\x03")
            # Its echo comes before what it does: a second press now would hit the next line.
            while select.select([self.descriptor], [], [], 5.0)[0]:
                self.read()
                if re.search(pattern, self.seen, re.DOTALL):
                    break
        self.seen = ""

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended by itself
        os.close(self.descriptor)


@pytest.fixture
def terminal(model_folder: Path, tmp_path: Path, request: Any) -> Iterator[Terminal]:
    started = Terminal(model_folder, tmp_path, getattr(request, "param", "xterm"))
    yield started
    started.close()


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    opening = terminal.expect(PROMPT)
    assert "I am Sei." in opening
    assert "Try: sing" in opening
    terminal.send("hello\r")
    # Its echo, and the first text of an answer of 8,000 tokens.
    terminal.expect("hello\r+\n[^\r\x1b]")
    terminal.send("\x03")
    terminal.expect(r"\[stopped\]\r\n\[\d+ tokens?.*, first after \d+\.\d\d s\]\r\n.*" + PROMPT)
    terminal.send("half a line")
    terminal.expect("half a line")
    terminal.interrupt_until("\r\n.*" + PROMPT)
    terminal.send("/clear\r")
    terminal.expect("A new conversation begins.\r\n.*" + PROMPT)
    terminal.send("/sing\r")
    terminal.expect("There is no command /sing")
    terminal.expect("\n" + PROMPT)
    terminal.send("\x04")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize("terminal", ["dumb"], indirect=True)
def test_a_terminal_that_can_do_nothing(terminal: Terminal) -> None:
    terminal.expect(PROMPT)
    terminal.send("/set max_tokens=1\r")
    terminal.expect("max_tokens = 1\r+\n" + PROMPT)
    terminal.send("hello\r")
    terminal.expect(r"\[1 token, first after")
    terminal.expect(PROMPT)
    terminal.send("/exit\r")
    assert terminal.exit_code() == 0


def test_answers_in_a_file_and_all_else_for_the_person(model_folder: Path, tmp_path: Path) -> None:
    (first,) = expected(model_folder, 4, "hello")
    terminal = Terminal(model_folder, tmp_path, out=tmp_path / "answers")
    try:
        assert "I am Sei." in terminal.expect(PROMPT)
        terminal.send("/set max_tokens=4\r")
        terminal.expect("max_tokens = 4\r+\n" + PROMPT)
        terminal.send("hello\r")
        terminal.expect(r"\[4 tokens.*\n" + PROMPT)
        terminal.send("/exit\r")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    assert (tmp_path / "answers").read_text() == f"{printable(first)}\n"


def test_commands_in_a_terminal(terminal: Terminal, model_folder: Path, tmp_path: Path) -> None:
    """A sum of settings, turns and files. What is typed is kept for this user alone."""
    first, second = expected(model_folder, 8, "hello\nyou", "sing")
    terminal.expect(PROMPT)
    for text, answer in (
        ("/set max_tokens 8", "max_tokens = 8"),
        ("/set temperature=3", "less than or equal to 2.*expected: 0..2"),
        ("hello\\\ryou", re.escape(first.splitlines()[0])),
        ("sing", r"\[8 tokens"),
        ("/undo", "Forgotten: sing"),
        ("sing", r"\[8 tokens"),
        ("/retry", r"\[8 tokens"),
        (f"/save {tmp_path}/a.json", "Saved in"),
        (f"/save {tmp_path}/chat.md", "Saved in"),
        ("/clear", "A new conversation"),
        (f"/save {tmp_path}/b.json", "nothing to save"),
        (f"/load {tmp_path}/chat.md", "Loaded 2 turns"),
        (f"/save {tmp_path}/b.json", "Saved in"),
        (f"/save {tmp_path}/a.json", "already"),
    ):
        terminal.send(f"{text}\r")
        terminal.expect(f"{answer}.*\n{PROMPT}")
    terminal.send("/exit\r")
    assert terminal.exit_code() == 0
    said = [json.loads((tmp_path / name).read_text())["messages"] for name in ("a.json", "b.json")]
    assert [m["content"] for m in said[0]] == ["hello\nyou", first, "sing", second]
    assert said[0] == said[1]
    history = tmp_path / "rorqual" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert json.loads(history.read_text().splitlines()[2]) == "hello\nyou"


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
