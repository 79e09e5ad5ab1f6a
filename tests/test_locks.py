"""Locks between real processes. Oracle: the operating system, which frees what a dead one held."""

from __future__ import annotations

import os
import platform
import signal
from pathlib import Path

import pytest

from holders import holder, started
from rorqual.errors import UsageError
from rorqual.locks import FOLDER_LOCK, FileLock, FolderLock


def test_a_second_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(holder(folder), "held") as words:
        with pytest.raises(UsageError, match="held by") as caught, FolderLock(folder, "held by X"):
            pass
        assert f"process {words[-1]} on {platform.node()}" in str(caught.value)
        assert "wait until that process ends" in str(caught.value)
        assert (folder / FOLDER_LOCK).exists()


def test_what_a_killed_process_left_is_harmless(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(holder(folder), "held") as words:
        os.kill(int(words[-1]), signal.SIGKILL)
        os.waitid(os.P_PID, int(words[-1]), os.WEXITED | os.WNOWAIT)
    assert (folder / FOLDER_LOCK).exists()
    with FolderLock(folder, "held"):
        (folder / "work").touch()
    assert [path.name for path in folder.iterdir()] == ["work"]


def test_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(holder(folder, "child"), "held") as words:
        *children, pid = map(int, words[1:])
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            for child in children:
                os.kill(child, 0)  # it lives
            with FolderLock(folder, "held"):
                pass
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_leaves_the_block_frees_nothing(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "x.lock", "held")
    with lock:
        if (child := os.fork()) == 0:
            lock.__exit__()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UsageError), FileLock(tmp_path / "x.lock", "held"):
            pass
    assert not (tmp_path / "x.lock").exists()


def test_a_lock_on_a_removed_file_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder removes the file between our open and our lock: the new file counts."""
    from rorqual import locks

    path, real, calls = tmp_path / "x.lock", locks._try_lock, []

    def late(descriptor: int, where: Path) -> bool:
        if not calls:
            path.unlink()
        calls.append(where)
        return real(descriptor, where)

    monkeypatch.setattr(locks, "_try_lock", late)
    with FileLock(path, "held"):
        assert len(calls) == 2
        with pytest.raises(UsageError), FileLock(path, "held"):
            pass


def test_a_new_folder_goes_if_nothing_was_put_in_it(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a/b", "held"):
        pass
    assert not (tmp_path / "a/b").exists()
    (tmp_path / "mine").mkdir()
    with FolderLock(tmp_path / "mine", "held"):
        pass
    assert (tmp_path / "mine").exists()


def test_setting_aside_keeps_all_and_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for number in (1, 2):
        (folder / "kept").write_text(str(number))
        with FolderLock(folder, "held") as lock:
            assert lock.set_aside() == tmp_path / f"run.old-{number}"
            assert lock.set_aside() is None
            with pytest.raises(UsageError), FolderLock(folder, "held"):
                pass
        folder.mkdir(exist_ok=True)
        assert [p.name for p in (tmp_path / f"run.old-{number}").iterdir()] == ["kept"]
        assert (tmp_path / f"run.old-{number}" / "kept").read_text() == str(number)


@pytest.mark.parametrize("kind", [FileLock, FolderLock])
def test_what_the_system_refuses_has_its_own_mend(tmp_path: Path, kind: type[FileLock]) -> None:
    """Not the one against another holder."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x"
    with pytest.raises(UsageError) as caught, kind(path, "held", fix="choose another run"):
        pass
    assert caught.value.where == path
    assert caught.value.what == "a folder is needed, and a part of the path is a file"
    assert caught.value.fix == "name another place"


def test_a_file_that_cannot_be_opened_is_told_of_what_is_locked(tmp_path: Path) -> None:
    (tmp_path / "run" / FOLDER_LOCK).mkdir(parents=True)
    with pytest.raises(UsageError) as caught, FolderLock(tmp_path / "run", "held", fix="other"):
        pass
    assert caught.value.where == tmp_path / "run"
    assert str(tmp_path / "run" / FOLDER_LOCK) in str(caught.value.found)


def test_no_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuses(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with FileLock(tmp_path / "x.lock", "held"):
        assert "has no locks" in caplog.text


def test_a_full_disk_leaves_the_lock_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with FolderLock(folder, "held"):
            with pytest.raises(UsageError, match="held"), FolderLock(folder, "held"):
                pass
            (folder / "work").touch()
    with FolderLock(folder, "held"):  # it was freed
        pass
