"""The state folder: where it is, who may read it, and the locks by which servers see each other.

    rorqual.db      the rows of files, batches, answers and responses
    files/ID        the bytes of a file
    servers/NAME    a lock that its server holds as long as it lives, and no longer

Folders are made for this user alone (0700), as are the database and the files (0600).
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from rorqual.errors import UsageError
from rorqual.files import explained, state_folder
from rorqual.locks import FileLock

DATABASE = "rorqual.db"
FOLDERS = ("files", "servers")
FIX = "choose another --state-dir"


def default_folder() -> Path:
    """Where a server keeps its state if nobody says. UsageError for a user without a home."""
    return state_folder("name a folder with --state-dir")


def open_folder(chosen: Path | None) -> Path:
    """The folder, made if need be; a temporary one if None. UsageError if it cannot be used."""
    if chosen is None:
        try:
            return Path(tempfile.mkdtemp(prefix="rorqual-state-"))
        except OSError as problem:
            fix = "make room there, or name a folder with --state-dir"
            raise UsageError(f"files cannot be kept: {problem}", fix=fix) from None
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise explained(problem, UsageError, chosen, FIX) from None
    if not os.access(chosen, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(
            "cannot be the state folder: this user may not write there",
            where=chosen,
            expected="a folder that this user may write to, or a name for a new one",
            fix=FIX,
        )
    return chosen


def inner_folder(folder: Path, name: str) -> Path:
    """A folder in the state folder, readable by this user only whatever the outer one's mode."""
    inner = folder / name
    try:
        inner.mkdir(mode=0o700, exist_ok=True)
    except OSError as problem:
        raise explained(problem, UsageError, inner, FIX) from None
    return inner


def check_folder(chosen: Path) -> None:
    """Opens the folder, its database and its folders once: UsageError before a model is loaded."""
    from rorqual.serve.store.database import Database

    folder = open_folder(chosen)
    for name in FOLDERS:
        inner_folder(folder, name)
    Database(folder / DATABASE).close()


class Presence:
    """This server among those that share the folder: a name, and a lock held until it ends.

    The system frees the lock however the process ends, so `is_gone` never errs. On a file system
    without locks everybody seems gone: then work may be done twice, and the database, where only
    the last who took a batch may write its answers, still keeps each once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = inner_folder(folder, "servers")
        self.name = secrets.token_hex(8)
        self._lock = self._lock_of(self.name)
        self._lock.__enter__()

    def is_gone(self, name: str) -> bool:
        """Whether the server of that name has ended."""
        if name == self.name:
            return False
        try:
            with self._lock_of(name):
                return True
        except UsageError:
            return False

    def clean(self) -> None:
        """Removes the locks of servers that were killed."""
        for path in self._folder.glob("*.lock"):
            with suppress(OSError):
                self.is_gone(path.stem)

    def close(self) -> None:
        self._lock.__exit__()

    def _lock_of(self, name: str) -> FileLock:
        return FileLock(self._folder / f"{name}.lock", "this server is alive")
