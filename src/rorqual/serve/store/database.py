"""The database: SQLite in WAL mode, one connection, one thread, one transaction a piece of work.

Work is a function of the connection. It runs on the database's own thread, never on the event
loop, and is done whole or not at all, whatever ends the process. A second server on the same
database waits for the end of our transaction, and we for the end of its.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rorqual.errors import UsageError
from rorqual.files import explained
from rorqual.log import logger
from rorqual.serve.errors import ApiError

log = logger("serve")

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

BUSY_SECONDS = 30.0
"""How long we wait for another server's transaction: they take milliseconds."""
SCHEMAS = (
    """
    CREATE TABLE files (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        purpose TEXT NOT NULL,
        num_bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        writer TEXT -- the server that still writes its bytes; NULL: they are there
    );
    CREATE TABLE batches (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        model TEXT NOT NULL,
        input_file_id TEXT NOT NULL,
        status TEXT NOT NULL,
        runner TEXT, -- the server that runs it
        num_starts INTEGER NOT NULL DEFAULT 0, -- since its last answer
        num_completed INTEGER NOT NULL DEFAULT 0,
        num_failed INTEGER NOT NULL DEFAULT 0,
        output_seconds INTEGER, -- how long the files of its answers last
        reply TEXT NOT NULL
    );
    CREATE INDEX batches_by_status ON batches (status);
    CREATE TABLE answers (
        batch_id TEXT NOT NULL,
        line INTEGER NOT NULL,
        is_good INTEGER NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (batch_id, line)
    );
    CREATE TABLE responses (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        previous_id TEXT,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        num_bytes INTEGER NOT NULL,
        body TEXT NOT NULL
    );
    CREATE INDEX responses_by_owner ON responses (owner, num_bytes, id);
    CREATE INDEX responses_by_end ON responses (expires_at);
    """,
)
"""What leads from each version of the schema to the next; an empty database has version 0."""
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class StorageError(ApiError):
    """The store cannot do it now. Nothing that was stored is lost."""

    @classmethod
    def from_disk(
        cls, problem: OSError | sqlite3.Error, where: Path, *, is_told: bool = False
    ) -> StorageError:
        """503, or 500 where it will not pass by itself; the log says where, unless it has."""
        if not is_told:
            log.error("%s: %s", where, problem)
        code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            text = "the server's database is damaged; its log says which"
            return cls(500, text, code="storage_damaged")
        if code == sqlite3.SQLITE_FULL or getattr(problem, "errno", None) in FULL:
            text, name = "the server's disk is full; what was stored before is kept", "disk_full"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            text, name = "the server's database is busy; try again later", "storage_busy"
        else:
            text, name = "the server's disk fails; its log says more", "storage_failed"
        return cls(503, text, code=name, headers={"retry-after": "10"})


class Database:
    """An open database of the newest schema."""

    def __init__(self, path: Path) -> None:
        """Makes or opens it. UsageError for one that is damaged, foreign or newer than we."""
        self.path = path
        try:
            # SQLite gives its own files the mode of the database.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as problem:
            raise explained(problem, UsageError, path, "choose another --state-dir") from None
        self._connection = self._connect()
        try:
            self._prepare()
        except sqlite3.Error as problem:
            self._connection.close()
            raise _cannot_open(problem, path) from None
        except UsageError:
            self._connection.close()
            raise
        self._thread = ThreadPoolExecutor(1, "rorqual-store")
        self._trouble: str | None = None
        """What the log says of the disk since the last time that something was stored."""

    async def run(self, work: Work[T]) -> T:
        """Runs `work` as a transaction. StorageError if that cannot be; then nothing has changed.

        A caller that is cancelled meanwhile does not stop it.
        """
        return await asyncio.wrap_future(self._submit(work, "IMMEDIATE"))

    async def read(self, work: Work[T]) -> T:
        """The same for work that changes nothing: it waits for no other server."""
        return await asyncio.wrap_future(self._submit(work, "DEFERRED"))

    def do(self, work: Work[T]) -> T:
        """`run` for a thread that may wait."""
        return self._submit(work, "IMMEDIATE").result()

    def look(self, work: Work[T]) -> T:
        """`read` for a thread that may wait."""
        return self._submit(work, "DEFERRED").result()

    def rows(self, sql: str, *values: object) -> Iterator[sqlite3.Row]:
        """Rows one by one, by a connection of its own, for a thread: others need not wait."""
        connection = self._connect()
        try:
            yield from connection.execute(sql, values)
        except sqlite3.Error as problem:
            raise StorageError.from_disk(problem, self.path) from None
        finally:
            connection.close()

    def close(self) -> None:
        """After the work that has begun."""
        self._thread.shutdown()
        self._connection.close()

    def _submit(self, work: Work[T], kind: str) -> Future[T]:
        return self._thread.submit(self._transact, work, kind)

    def _transact(self, work: Work[T], kind: str) -> T:
        connection = self._connection
        try:
            connection.execute(f"BEGIN {kind}")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite may have rolled back itself
                    connection.execute("ROLLBACK")
                raise
            if kind == "IMMEDIATE":
                self._trouble = None
            return result
        except sqlite3.Error as problem:
            is_told = str(problem) == self._trouble
            self._trouble = str(problem)
            raise StorageError.from_disk(problem, self.path, is_told=is_told) from None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        return connection

    def _prepare(self) -> None:
        connection = self._connection
        if self._version() == 0:  # has an effect before the first table only
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was said to be stored is stored
        connection.execute(
            "BEGIN IMMEDIATE"
        )  # of two servers that start at once, one makes the tables
        try:
            self._migrate()
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _migrate(self) -> None:
        version, newest = self._version(), len(SCHEMAS)
        num_tables = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if version > newest:
            raise UsageError(
                "is a database of a newer rorqual",
                where=self.path,
                found=f"schema version {version}",
                expected=f"at most {newest}",
                fix="use that version, or choose another --state-dir",
            )
        if version == 0 and num_tables:
            raise UsageError(
                "is a database of another program",
                where=self.path,
                found=f"{num_tables} tables and no version",
                fix="choose another --state-dir",
            )
        for schema in SCHEMAS[version:]:
            for statement in filter(str.strip, schema.split(";\n")):
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA user_version = {newest}")

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])


def _cannot_open(problem: sqlite3.Error, path: Path) -> UsageError:
    code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        what = "is damaged, or no database"
        fix = "restore it from a copy, or move it away (files and batches in it are lost)"
        return UsageError(what, where=path, found=str(problem), fix=f"{fix}, then start again")
    fix = "free the disk or the file, or choose another --state-dir"
    return UsageError("cannot be opened", where=path, found=str(problem), fix=fix)


def ordered_id(prefix: str) -> str:
    """An id that sorts behind all that were made before, so that a list can go on behind one that
    is gone. 64 random bits keep it from being guessed.
    """
    return f"{prefix}{time.time_ns() // 1000:014x}{secrets.token_hex(8)}"
