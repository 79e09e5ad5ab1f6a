"""Locks between processes: on a file, or on a folder by a file in it."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from rorqual.errors import UsageError
from rorqual.files import explained
from rorqual.log import logger

FOLDER_LOCK = ".lock"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
LOCKED_BYTE = 1 << 30  # where Windows locks, which keeps others from reading what it locks


class HeldError(UsageError):
    """Another process holds the lock."""


class FileLock:
    """A lock of the operating system on a file: one holder on all of the machine's processes.

    The system frees it when its holder ends, however it ends, so a file that a killed process left
    behind means nothing. Programs started by the holder do not keep it (the descriptor is closed on
    exec, and by a hook in forked children). The file tells who holds it. Re-entering is refused:
    two parts of one program are two users too.
    """

    def __init__(
        self, path: str | os.PathLike[str], refusal: str, *, where: object = None, fix: str = ""
    ) -> None:
        """`refusal` is said to the second who comes, of `where` (the file itself if None)."""
        self.path = Path(path)
        self.refusal, self.where, self.fix = refusal, where or self.path, fix
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """HeldError where another holds it; UsageError for a path that the system refuses."""
        try:
            self._take()
        except OSError as problem:
            if self.path.is_symlink():  # to write through it would write into another file
                fix = f"remove the link {self.path}"
                raise UsageError(
                    "is a link in the place of a lock", where=self.path, fix=fix
                ) from None
            raise explained(problem, UsageError, self.where) from None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the file and frees the lock; a forked child that comes here does neither."""
        if self._descriptor is not None:
            if self._has_path(self._descriptor):
                with suppress(OSError):  # open files cannot be removed on Windows
                    self.path.unlink()
            self._close()

    def _take(self) -> None:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
            try:
                if not _try_lock(descriptor, self.path):
                    raise self._refused()
                # Between open and lock the last holder may have removed the file: a lock on what
                # has no name keeps nobody out.
                if self._has_path(descriptor):
                    os.ftruncate(descriptor, 0)
                    with suppress(OSError):  # a full disk: who holds it stays unsaid
                        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                    self._descriptor = descriptor
                    return
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)

    def _has_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _refused(self) -> HeldError:
        try:
            holder = self.path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        except OSError:
            holder = ""
        fix = "wait until that process ends, or stop it"
        return HeldError(
            self.refusal,
            where=self.where,
            found=f"the lock {self.path} of {holder or 'a process that has just begun'}",
            fix=f"{fix}; {self.fix}" if self.fix else fix,
        )


class FolderLock(FileLock):
    """The lock of a folder, which it makes: `.lock` in it, so that whoever sees the folder sees
    the lock, by whatever path. A new folder in which nothing was put is removed again.
    """

    def __init__(self, folder: str | os.PathLike[str], refusal: str, *, fix: str = "") -> None:
        self.folder = Path(folder)
        super().__init__(self.folder / FOLDER_LOCK, refusal, where=self.folder, fix=fix)

    def __enter__(self) -> Self:
        self._is_new = not self.folder.exists()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        is_mine = self._descriptor is not None
        super().__exit__()
        if is_mine and self._is_new:
            with suppress(OSError):  # something is in it
                self.folder.rmdir()

    def _take(self) -> None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another removed the empty folder meanwhile
                return super()._take()

    def set_aside(self) -> Path | None:
        """Renames the folder to `<name>.old-N` and goes on with an empty one of its name; None if
        it was empty. Only the holder of the lock can: a folder in use is never moved.
        """
        assert self._descriptor is not None, "the lock is not held"
        if all(path == self.path for path in self.folder.iterdir()):
            return None
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        held, self._descriptor = self._descriptor, None
        try:
            self.folder.rename(aside)
            self._take()
        finally:
            (aside / FOLDER_LOCK).unlink(missing_ok=True)
            os.close(held)
        return aside


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock on this file, as far as can be told; nothing is changed."""
    try:
        descriptor = os.open(path, os.O_RDWR | NO_LINK)
    except OSError as problem:
        return isinstance(problem, PermissionError)
    try:
        return not _try_lock(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    """Whether the lock was free and is now ours."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as problem:
        # Some network file systems have no locks. To refuse all work there would help nobody.
        logger(__name__).warning("%s: the file system has no locks (%s)", path, problem)
    return True
