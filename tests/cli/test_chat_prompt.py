"""The prompt, with keys from a pipe. Oracle: the texts that these keys write."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from rorqual.cli import prompt as prompt_module
from rorqual.cli.prompt import Commands, FileHistory, Prompt, history_file

UP, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[A", "\x03", "\x04", "\x1b\r"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # else prompts go to standard error
    monkeypatch.setenv("TERM", "xterm")
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("hello\r", "hello"),
        ("  hello \r", "hello"),
        (f"a{ALT_ENTER}b\r", "a\nb"),
        ("a\\\rb\\\rc\r", "a\nb\nc"),
        ("a\\b\r", "a\\b"),
        ("\x1b[200~a\nb\n\x1b[201~\r", "a\nb"),  # pasted: nothing is sent before Enter
        (f"half{CTRL_C}", ""),
        (CTRL_D, None),
        ("\r", ""),
    ],
)
def test_what_keys_write(keys: Any, typed: str, text: str | None) -> None:
    prompt = Prompt(["/system", "/set", "/clear"], None)
    keys.send_text(typed)
    assert prompt.read() == text


def test_a_byte_that_is_no_text_is_replaced(keys: Any) -> None:
    """Half an emoji and a stray byte, as a paste in another encoding brings them."""
    prompt = Prompt([], None)
    keys.send_bytes(b"a\xffb\xf0\x9f\r")
    text = prompt.read()
    assert text is not None
    assert text.encode().decode().startswith("a\ufffdb")


def test_commands_are_completed() -> None:
    completer = Commands(["/system", "/set", "/clear"])

    def completed(text: str) -> list[str]:
        found = completer.get_completions(Document(text), CompleteEvent())
        return [text[: completion.start_position] + completion.text for completion in found]

    assert completed("/s") == ["/system", "/set"]
    assert completed("/sy") == ["/system"]
    assert completed("no/sy") == completed("") == completed("/set ") == []


def test_the_history_outlasts_the_program(keys: Any, tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat_history"
    prompt = Prompt([], path)
    for text in ("first", f"two{ALT_ENTER}lines"):
        keys.send_text(f"{text}\r")
        prompt.read()
    assert [json.loads(line) for line in path.read_text().splitlines()] == ["first", "two\nlines"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = Prompt([], path)
    keys.send_text(f"{UP}{UP}{UP}\r")
    assert again.read() == "first"


def test_a_history_of_others_is_made_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text('"a"\nno json\n7\n"b"\n')
    path.chmod(0o644)
    history = FileHistory(path)
    assert list(history.load_history_strings()) == ["b", "a"]
    history.store_string("c\nd")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(history.load_history_strings()) == ["c\nd", "b", "a"]


def test_a_long_history_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_module, "MAX_ENTRIES", 3)
    path = tmp_path / "chat_history"
    left_over = tmp_path / "chat_history.new"  # by a program that was killed
    left_over.write_text('"old"\n' * 9)
    history = FileHistory(path)
    for number in range(7):
        history.store_string(str(number))
    assert list(history.load_history_strings()) == ["6", "5", "4"]
    assert path.read_text() == '"4"\n"5"\n"6"\n'
    assert not left_over.exists()


def test_a_history_that_cannot_be_kept_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path, Path("/proc/none/chat_history")):
        history = FileHistory(path)
        assert list(history.load_history_strings()) == []
        history.store_string("a")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "rorqual" / "chat_history"
