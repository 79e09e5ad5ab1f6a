"""Whose packed weights are used: this user's own, as they were written. And what is left of others.

Oracle: the model that was packed from its files, and the files that lie in the folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import WIDE
from test_packed_cache import broken
from test_packed_cache_places import starting
from test_stored import checkpoint, needs_native

from in_process import run
from rorqual.errors import UsageError
from rorqual.locks import FileLock, HeldError, is_held
from rorqual.model.stored import StoredStack
from rorqual.weights import load, packed_cache
from rorqual.weights.packed_cache import kept_files

pytestmark = [needs_native, pytest.mark.usefixtures("cache")]
IDS = torch.arange(7)[None]


@pytest.fixture
def file(little: Path, cache: Path, said: Callable[[], list[str]]) -> Path:
    """What is kept of the little model."""
    load(little, "native")
    said()
    (found,) = cache.iterdir()
    return found


def foreign(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    return "it belongs to another user"


def open_to_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    file.chmod(0o666)
    return "every user may change it"


def linked(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """To another's file of the same bytes."""
    other = file.parent.parent / "other"
    shutil.copy2(file, other)
    file.unlink()
    file.symlink_to(other)
    return foreign(other, monkeypatch)


def changed_within(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A byte that no page at the edge of a tensor has: it would be a wrong weight."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\x55\xaa")
    return "it was changed after it was written"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users of Unix")
@pytest.mark.parametrize("change", [foreign, open_to_all, linked, changed_within])
def test_what_is_not_as_this_user_left_it_is_made_anew(
    change: Callable[[Path, pytest.MonkeyPatch], str], file: Path, little: Path,
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    exact = load(little, "native", kernels="decoded")
    stacks = [part for part in exact.modules() if isinstance(part, StoredStack)]
    with monkeypatch.context() as other:
        why = change(file, other)
        (kept,) = kept_files()
        assert kept.problem == why
        found = load(little, "native")
        assert said()[0].endswith(f"does not fit: {why}")
    packed = [part for part in found.modules() if isinstance(part, StoredStack)]
    for one, same in zip(stacks, packed, strict=True):
        assert torch.equal(one.dense(0), same.dense(0))
    load(little, "native")
    assert said() == []
    assert file.stat().st_uid == os.geteuid()


def test_nobody_else_may_write_what_is_kept(little: Path, cache: Path) -> None:
    before = os.umask(0)
    try:
        load(little, "native")
    finally:
        os.umask(before)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("now", [0.0, 1.0, 1e9 + 0.7, 4e9])
def test_a_clock_that_is_wrong_changes_nothing(
    now: float, little: Path, not_read: Callable[[], None], said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(packed_cache.time, "time", lambda: now)
    load(little, "native")
    said()
    not_read()
    monkeypatch.setattr(packed_cache.time, "time", lambda: now - 1e6)
    load(little, "native")
    assert said() == []


def test_a_file_that_is_replaced_while_it_is_opened(
    file: Path, little: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header and what is mapped are of one file."""
    check, taken = packed_cache._check_fits, []

    def meanwhile(*given: Any) -> None:
        check(*given)
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(bytes(len(data)))
        taken.append(file)

    monkeypatch.setattr(packed_cache, "_check_fits", meanwhile)
    exact = load(little, "native", kernels="decoded")
    found = load(little, "native")
    assert taken == [file]
    stacks = ([p for p in m.modules() if isinstance(p, StoredStack)] for m in (exact, found))
    for one, same in zip(*stacks, strict=True):
        assert torch.equal(one.dense(0), same.dense(0))


def test_clearing_leaves_a_model_that_runs(file: Path, little: Path) -> None:
    model = load(little, "native")
    before = model(IDS)
    assert run("cache", "clear").out.startswith("1 removed, ")
    assert not file.exists()
    assert torch.equal(model(IDS), before)


def test_a_name_that_is_no_text(tmp_path: Path, cache: Path, not_read: Callable[[], None]) -> None:
    """Of a file made where names were in another encoding."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    try:
        checkpoint("gguf:Q8_0", WIDE, tmp_path).rename(place)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    load(place, "native")
    not_read()
    load(place, "native")
    done = run("cache", "list")
    assert (done.code, done.out.count("fits")) == (0, 1), done.err
    assert run("cache", "verify").code == 0


# A lock is a file of ours


def test_a_link_in_the_place_of_a_lock_is_not_written_through(tmp_path: Path) -> None:
    """Where others may write, it could lead to any file of this user's."""
    mine, lock = tmp_path / "mine", tmp_path / "x.lock"
    mine.write_text("precious")
    lock.symlink_to(mine)
    with (
        pytest.raises(UsageError, match="is a link in the place of a lock"),
        FileLock(lock, "held"),
    ):
        pass
    assert mine.read_text() == "precious"
    assert not is_held(lock)


def test_a_lock_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    assert not is_held(path)
    assert not path.exists()
    with FileLock(path, "held"):
        assert is_held(path)
        with pytest.raises(HeldError), FileLock(path, "held"):
            pass
    path.touch()
    assert not is_held(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_without_a_lock_is_told(
    number: int, little: Path, cache: Path, said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As one that only can be read: not taken for one where another process writes."""
    cache.mkdir(parents=True)

    def refuse(self: FileLock) -> None:
        raise OSError(number, os.strerror(number), str(self.path))

    monkeypatch.setattr(FileLock, "_take", refuse)
    load(little, "native")
    (told,) = said()
    assert "packed weights are not kept, so they are packed at each start" in told
    assert os.strerror(number) in told


# What a killed process left


def test_what_is_left_is_listed_and_cleared(file: Path, cache: Path) -> None:
    left = cache / f".another-{'0' * 12}.native.packed.{'a' * 12}"
    left.write_bytes(bytes(1000))
    (cache / "notes.txt").write_text("somebody's own")
    rows = json.loads(run("cache", "list", "--json").out)
    assert [(row["bytes"], row["state"]) for row in rows if row["file"] == str(left)] == [
        (1000, "left by a process that was stopped")
    ]
    assert run("cache", "verify").code == 2
    assert run("cache", "clear").out.startswith("2 removed, ")
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


@pytest.mark.concurrency
def test_what_is_being_written_is_listed_and_stays(little: Path, cache: Path) -> None:
    process = starting(little, cache, "writing")
    (row,) = json.loads(run("cache", "list", "--json").out)
    assert row["state"] == "being written"
    assert run("cache", "verify").code == 0
    assert run("cache", "clear").out.startswith("0 removed, ")
    _, errors = process.communicate("go on\n")
    assert process.returncode == 0, errors
    (kept,) = kept_files()
    assert broken(kept.path, lambda _: None) == []


def test_one_that_cannot_be_removed_keeps_no_other(file: Path, cache: Path) -> None:
    (cache / "a.native.packed").mkdir()
    done = run("cache", "clear")
    assert done.code == 2
    assert done.out.startswith("1 removed, ")
    assert f"not removed: {cache / 'a.native.packed'}: " in done.err
    assert not file.exists()


def test_a_path_is_listed_whole(cache: Path, tmp_path: Path) -> None:
    """And as it is: no part of it is markup."""
    from rorqual.weights import save
    from small import SMALL, lively

    path = tmp_path / "[/v2]" / ("a-name-without-an-end-" * 5) / "[bold]:bug:"
    save(lively(SMALL), path, "bfloat16")
    load(path, "native")
    (row,) = [line for line in run("cache", "list").out.splitlines() if "fits" in line]
    assert row.startswith(f"{path.resolve()} ")
