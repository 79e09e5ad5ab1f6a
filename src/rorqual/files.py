"""Writes that are whole or absent: temporary name, fsync, rename (STYLE rule 19).

Modes are those that `open` and `mkdir` give, so the umask decides who may read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rorqual.errors import RorqualError, UsageError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}")  # as `_temporary` makes them


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory entry to the disk."""
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
            os.replace(temporary, path)
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


def read_json(
    path: str | os.PathLike[str], error: type[RorqualError] = RorqualError
) -> dict[str, Any]:
    """Reads a JSON object; a missing, broken or non-object file raises `error` with the place."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error("no such file", where=path) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"cannot be read: {problem}", where=path) from None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise error(
            f"is not valid JSON: {problem}", where=path, fix="restore the file from its source"
        ) from None
    if not isinstance(value, dict):
        raise error(
            "is not a JSON object", where=path, found=type(value).__name__, expected="{...}"
        )
    return value
