"""Writes that are whole or absent (temporary name, fsync, rename), reads and writes at an offset,
and locks between processes.

Modes are those that `open` and `mkdir` give, so the umask decides who may read.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from rorqual.errors import RorqualError, UsageError
from rorqual.log import logger

T = TypeVar("T")
FOLDER_LOCK = ".lock"
MAX_TEXT_BYTES = 1 << 30  # the largest tokenizer.json in use has 40 MB
# What json.loads raises: a number of more than 4,300 digits is a ValueError without a place.
NOT_JSON = (ValueError, RecursionError)
BINARY = getattr(os, "O_BINARY", 0)  # else Windows changes ends of lines
LOCKED_BYTE = 1 << 30  # where Windows locks, which keeps others from reading what it locks
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = (b"<!doctype html", b"<html", b"<head")
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}")  # as `_temporary` makes them


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory entry to the disk; Windows opens no directories."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; on a clean exit it is fsynced and takes the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    temporary = _temporary(path)
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that takes the name on a clean exit.

    With `replace` an existing directory is swapped out only after the new one is whole; without
    it an existing non-empty directory is an error before anything is written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError("is a file; a directory is needed", where=path)
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise UsageError(
            "already exists and is not empty",
            where=path,
            fix="choose another directory or remove this one; nothing was written",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    file_mode = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():  # some libraries make theirs private
                file.chmod(file_mode)
            fsync_path(file)
        if path.is_dir():
            old = _temporary(path)
            old.mkdir()
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def final_name(path: Path) -> str | None:
    """The name that a file or directory in work was to take; None if it is not one of ours."""
    match = _TEMPORARY.fullmatch(path.name)
    return match[1] if match else None


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


@dataclass(frozen=True)
class StandIn:
    """What lies in the place of a file that was meant, and how to get that file."""

    what: str
    fix: str | None


def stand_in(path: Path) -> StandIn | None:
    """A link to nothing, or a git-lfs pointer or a web page, told by its first bytes; None for
    anything else.
    """
    if path.is_symlink() and not path.exists():
        return StandIn(
            "is a link to a file that is not there",
            "put the file itself in its place: copy it again from where it lies",
        )
    if not path.is_file():  # to open a pipe would wait for whoever writes to it
        return None
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(LFS_POINTER):
        return StandIn(
            "is a git-lfs pointer, not the file that it points to",
            f"run `git lfs pull` in {path.parent}",
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGE):
        return StandIn(
            "is a web page, such as a site's login or error page, not the file itself",
            "download the file again, with the address of the file and signed in where that is "
            "needed",
        )
    return None


def mend_of(problem: OSError, path: str | os.PathLike[str]) -> str:
    """What helps against a file that the system does not let us read."""
    if isinstance(problem, PermissionError):
        return f"give this user the right to read {path}, or copy it to where it has that right"
    if isinstance(problem, IsADirectoryError):
        return "name a file: this is a folder"
    return "check the disk or the connection that the file lies on, then try again"


def is_there(path: Path) -> bool:
    """Whether a folder has this name, be it a link to nothing: its reader says what is wrong."""
    return os.path.lexists(path)


def read_text(path: str | os.PathLike[str], error: type[RorqualError] = RorqualError) -> str:
    """The text in UTF-8 of a file that a folder holds; `error` names what is wrong with it.

    What is no regular file (a pipe nobody writes to, a device without an end) is never opened.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise error("is not a regular file", where=path, fix="put the file itself in its place")
        if found.st_size > MAX_TEXT_BYTES:
            raise error(
                "is too large to be what its name says",
                where=path,
                found=f"{found.st_size:,} bytes",
                expected=f"at most {MAX_TEXT_BYTES:,}",
                fix="restore the file from its source",
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        link = stand_in(path) or StandIn("no such file", None)
        raise error(link.what, where=path, fix=link.fix) from None
    except OSError as problem:
        fix = mend_of(problem, path)
        raise error(f"cannot be read: {problem}", where=path, fix=fix) from None
    except UnicodeDecodeError as problem:
        raise error(
            f"is not text in UTF-8: {problem}", where=path, fix="restore the file from its source"
        ) from None
    if (other := stand_in(path)) is not None:
        raise error(other.what, where=path, fix=other.fix)
    return text


def read_json(
    path: str | os.PathLike[str], error: type[RorqualError] = RorqualError
) -> dict[str, Any]:
    """Reads a JSON object; a missing, broken or non-object file raises `error` with the place."""
    text = read_text(path, error)
    try:
        value = json.loads(text)
    except NOT_JSON as problem:
        raise error(
            f"is not valid JSON: {problem}", where=path, fix="restore the file from its source"
        ) from None
    if not isinstance(value, dict):
        raise error(
            "is not a JSON object", where=path, found=type(value).__name__, expected="{...}"
        )
    return value


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Reads into `buffer` from `offset` on; how many bytes there were. Any thread may."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = _moved(descriptor, offset, lambda: os.read(descriptor, len(buffer)))
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Writes at `offset` what the system takes at once; how many bytes. Any thread may."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    return _moved(descriptor, offset, lambda: os.write(descriptor, data))


_MOVING = threading.Lock()


def _moved(descriptor: int, offset: int, act: Callable[[], T]) -> T:
    """Without calls with an offset (Windows) all share a descriptor's place: one at a time."""
    with _MOVING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return act()


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
        self._take()
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
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
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

    def _refused(self) -> UsageError:
        try:
            holder = self.path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        except OSError:
            holder = ""
        fix = "wait until that process ends, or stop it"
        return UsageError(
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
