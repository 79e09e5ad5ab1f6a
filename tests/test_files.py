"""Atomic writes. Oracle: what `open` and `mkdir` do under the same umask."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rorqual import files
from rorqual.errors import ConfigError, UsageError
from rorqual.files import (
    atomic_directory,
    atomic_write,
    final_name,
    read_json,
    stand_in,
    write_json,
)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_modes_are_those_of_plain_writes(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "a.json", {"a": 1})
    assert mode(tmp_path / "a.json") == mode(tmp_path / "plain")
    for is_new in (True, False):
        with atomic_directory(tmp_path / "out", replace=not is_new) as folder:
            write_json(folder / "b.json", {})
            (folder / "inner").mkdir()
            # safetensors makes its files private, whatever the umask.
            save_file({"x": torch.zeros(2)}, folder / "inner" / "model.safetensors")
        assert mode(tmp_path / "out") == mode(tmp_path / "folder")
        assert mode(tmp_path / "out" / "inner") == mode(tmp_path / "folder")
        for name in ("b.json", "inner/model.safetensors"):
            assert mode(tmp_path / "out" / name) == mode(tmp_path / "plain"), name


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path, folder = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("old")
    folder.mkdir()
    (folder / "old").touch()

    def fail() -> str:
        raise error

    with pytest.raises(error), atomic_write(path, "w") as file:
        file.write(fail())
    with pytest.raises(error), atomic_directory(folder, replace=True) as new:
        (new / "new").write_text("new" + fail())
    with pytest.raises(UsageError, match="not empty"), atomic_directory(folder):
        pass
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "old", "out"]


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("at_call", [1, 2])
def test_an_interrupted_swap_leaves_one_of_the_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_call: int, is_done: bool
) -> None:
    """Ctrl-C comes before or after the old folder gives way, before or after the new one comes."""
    folder, replace, num_calls = tmp_path / "out", os.replace, 0
    folder.mkdir()
    (folder / "old").touch()

    def interrupted_once(source: Path, target: Path) -> None:
        nonlocal num_calls
        num_calls += 1
        is_now = num_calls == at_call
        if is_done or not is_now:
            replace(source, target)
        if is_now:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted_once)
    with pytest.raises(KeyboardInterrupt), atomic_directory(folder, replace=True) as new:
        (new / "new").touch()
    kept = "new" if at_call == 2 and is_done else "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([kept, "out"])


def test_what_is_in_work_tells_its_name(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / ".out.d") as folder:
        assert final_name(folder) == ".out.d"
        assert final_name(tmp_path / ".out.d") is None
        with atomic_write(folder / "a.json") as file:
            assert final_name(Path(file.name)) == "a.json"


OPENED_SECONDS = 120  # of a call that opens nothing; what opens the pipe waits for ever


class AlarmError(Exception):
    """The test would have waited without end."""


@pytest.fixture
def _no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(OPENED_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("kind", ["pipe", "pipe behind a link", "device"])
def test_what_is_no_file_is_never_opened(tmp_path: Path, kind: str) -> None:
    """Nobody writes to the pipe, and the device has no end."""
    path = tmp_path / "config.json"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe") if "link" in kind else os.rename(tmp_path / "pipe", path)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(path, ConfigError)
    assert stand_in(path) is None


def test_a_text_of_just_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": 123}')
    assert read_json(tmp_path / "a.json") == {"a": 123}
    (tmp_path / "a.json").write_text('{"a": 1234}')
    with pytest.raises(ConfigError, match="too large"):
        read_json(tmp_path / "a.json", ConfigError)


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # of holes: it takes no room
    with pytest.raises(ConfigError, match="too large"):
        read_json(path, ConfigError)


@pytest.mark.parametrize(
    "text", ["1" * 5000, '{"a": -' + "1" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000, ""]
)
def test_what_json_cannot_hold_is_told(tmp_path: Path, text: str) -> None:
    """Python reads no integer of more than 4,300 digits, and goes no deeper than its stack."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_json(path, ConfigError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("is_linked", [False, True])
def test_what_is_no_regular_file_is_written_to_and_never_replaced(
    tmp_path: Path, is_linked: bool
) -> None:
    """A pipe stands for /dev/null and /dev/stdout."""
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if is_linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with atomic_write(path, "w") as file:
            file.write("hello")
        assert stat.S_ISFIFO(path.stat().st_mode)
        assert path.is_symlink() == is_linked
        assert os.read(reader, 99) == b"hello"
        assert len(list(tmp_path.iterdir())) == 1 + is_linked
    finally:
        os.close(reader)
