"""Writes that are whole or absent (temporary name, fsync, rename), reads and writes at an offset.

Modes are those that `open` and `mkdir` give, so the umask decides who may read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from rorqual.errors import RorqualError, UsageError

T = TypeVar("T")
MAX_TEXT_BYTES = 1 << 30  # the largest tokenizer.json in use has 40 MB
# What json.loads raises: a number of more than 4,300 digits is a ValueError without a place.
NOT_JSON = (ValueError, RecursionError)
BINARY = getattr(os, "O_BINARY", 0)  # else Windows changes ends of lines
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = (b"<!doctype html", b"<html", b"<head")
TRY_AGAIN = "check the disk or the connection that the file lies on, then try again"
# By the system's number of the error: what was wrong, and what helps.
_REFUSED = {
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.EEXIST: ("there is something of this name already", "name another place"),
    errno.ENOTDIR: ("a folder is needed, and a part of the path is a file", "name another place"),
    errno.EISDIR: ("is a folder, and a file is needed", "name a file"),
    errno.ENOTEMPTY: ("the folder is not empty", "name another place, or empty it"),
    errno.EACCES: ("this user may not read or write here", "get that right, or name another place"),
    errno.EPERM: ("this user may not do that here", "get that right, or name another place"),
    errno.EROFS: ("this disk can only be read", "name a place on another disk"),
    errno.ENOSPC: ("the disk is full", "free some space and run the same command again"),
    getattr(errno, "EDQUOT", -1): (
        "this user's share of the disk is full",
        "free some space and try again",
    ),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("links go round in a circle", "put the file itself in their place"),
}
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}")  # as `_temporary` makes them


def cache_folder() -> Path:
    """Where what can be made again is kept for this user: $RORQUAL_CACHE, else as the platform has
    it. UsageError for a user without a home.
    """
    if chosen := os.environ.get("RORQUAL_CACHE"):
        return Path(chosen).absolute()
    fix = "name a folder in RORQUAL_CACHE"
    return _user_folder("XDG_CACHE_HOME", ".cache", "Library/Caches", fix)


def state_folder(fix: str) -> Path:
    """Where programs of this user keep their state, as the platform has it. UsageError, with `fix`,
    for a user without a home.
    """
    return _user_folder("XDG_STATE_HOME", ".local/state", "Library/Application Support", fix)


def _user_folder(variable: str, on_unix: str, on_a_mac: str, fix: str) -> Path:
    try:
        home = Path.home()
    except RuntimeError as problem:
        raise UsageError(str(problem), fix=fix) from None
    chosen = os.environ.get(variable, "")
    root: str | Path = home / on_unix
    if os.path.isabs(chosen):  # the XDG specification: a relative path is to be ignored
        root = chosen
    elif sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = home / on_a_mac
    return Path(root) / "rorqual"


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
    """Opens a temporary file beside `path`; on a clean exit it is fsynced and takes the name.

    What is no regular file (/dev/null, /dev/stdout, a pipe) is written to as it is: replacing it
    would take it away from everybody.
    """
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
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
    try:
        yield temporary
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(new: Path, path: Path) -> None:
    """Flushes all of a whole directory to the disk, then gives it the name of another beside it."""
    file_mode = new.stat().st_mode & 0o666
    for file in new.rglob("*"):
        if file.is_file() and not file.is_symlink():  # some libraries make theirs private
            file.chmod(file_mode)
        fsync_path(file)
    if path.is_dir():
        _swap(new, path)
    else:
        os.replace(new, path)
    fsync_path(path.parent)


def _swap(new: Path, path: Path) -> None:
    """Puts a folder in the place of another; an interruption at any moment leaves one of them."""
    old = _temporary(path)
    try:
        os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if path.exists():  # the old one, not moved yet, or the new one
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)
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
    return TRY_AGAIN


def explained(
    problem: OSError,
    error: type[RorqualError] = RorqualError,
    where: object = None,
    fix: str | None = None,
) -> RorqualError:
    """What the system refused, as an error that says where and what helps.

    `where` and `fix` are the caller's, who knows more; else the path that the system names. What
    is said of no path and for no known reason (a library's, a socket's) stands for itself.
    """
    path = problem.filename if problem.filename2 is None else problem.filename2
    if path is None and where is None and problem.errno not in _REFUSED:
        return error(str(problem) or type(problem).__name__, fix=fix)
    what, mend = _REFUSED.get(problem.errno or 0, ("cannot be read or written", TRY_AGAIN))
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    found = problem.strerror or str(problem)
    if where is not None and path is not None and os.fspath(path) != str(where):
        found = f"{found}: {path}"
    place = where if where is not None else path if isinstance(path, str | Path) else None
    return error(what, where=place, found=found, fix=fix or mend)


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
