"""Files: rows in the database, bytes beside it under generated ids.

A client's file name is kept as text and never becomes a path; nor does a request's id, which is
looked up among the rows. A row comes before its bytes and goes before them, so bytes without a row
belong to nobody. An input file outlives its deletion as long as a batch reads it, unseen.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rorqual.engine import FREE_PLACES_FACTOR
from rorqual.files import fsync_path
from rorqual.log import logger
from rorqual.serve.errors import ApiError
from rorqual.serve.schemas_batches import FileReply, Purpose
from rorqual.serve.settings import ServerSettings
from rorqual.serve.store.batch_table import IS_RUNNING
from rorqual.serve.store.database import Database, StorageError, ordered_id
from rorqual.serve.store.folder import Presence, inner_folder
from rorqual.serve.store.pages import Page

log = logger("serve")

FILE_ID = re.compile(r"file-[0-9a-f]{30}")
MAX_NAME_CHARACTERS = 200
IS_SEEN = "owner = ? AND writer IS NULL AND (expires_at IS NULL OR expires_at > ?)"
IS_IN_USE = f"id IN (SELECT input_file_id FROM batches WHERE {IS_RUNNING})"


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file that is to be: `seconds` after its making it expires, None: never."""

    name: str
    owner: str
    purpose: Purpose = "batch"
    seconds: int | None = None


class FileStore:
    """Files by id; an owner sees only their own."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        presence: Presence,
        settings: ServerSettings,
        clock: Callable[[], float],
    ) -> None:
        self._database, self._presence = database, presence
        self._settings, self._clock = settings, clock
        self.folder = inner_folder(folder, "files")
        self._dropped: set[str] = set()

    async def add(self, chunks: Iterable[bytes], num_bytes: int, new: NewFile) -> FileReply:
        """Keeps an upload; ApiError 413 or 429 when it is too large or there is no room.

        If the caller is cancelled, nothing of it stays.
        """
        settings = self._settings
        if num_bytes > settings.max_file_bytes:
            text = f"the file is longer than this server's limit of {settings.max_file_bytes} bytes"
            raise ApiError(413, text, code="file_too_large", param="file")
        is_given_up = threading.Event()

        def work() -> FileReply:
            self.purge()
            reply = self.stage(chunks, new, num_bytes)
            if is_given_up.is_set():
                self.drop(reply.id)
            else:
                self._database.do(lambda connection: self.show(connection, reply.id))
            return reply

        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            is_given_up.set()
            raise

    def stage(
        self, chunks: Iterable[bytes], new: NewFile, num_bytes: int | None = None
    ) -> FileReply:
        """Writes a file, in the caller's thread, that nobody sees before `show`.

        With `num_bytes` it is held to the limits of what is stored. StorageError if the disk fails.
        """
        reply = self._reserve(new, num_bytes)
        try:
            written = self._write(reply.id, chunks)
            self._database.do(
                lambda connection: connection.execute(
                    "UPDATE files SET num_bytes = ? WHERE id = ?", (written, reply.id)
                )
            )
        except BaseException:
            self.drop(reply.id)
            raise
        return reply.model_copy(update={"bytes": written})

    def show(self, connection: sqlite3.Connection, file_id: str) -> None:
        """Ends the writing, in the transaction that it belongs to."""
        connection.execute("UPDATE files SET writer = NULL WHERE id = ?", (file_id,))

    def drop(self, file_id: str) -> None:
        """Gives up what was staged; if the disk does not let us now, at the next `purge`."""
        self._dropped.add(file_id)
        with suppress(StorageError):
            self._drop_all()

    async def page(
        self, owner: str, page: Page, purpose: str | None
    ) -> tuple[list[FileReply], bool]:
        """An owner's files, and whether there are more."""

        def work(connection: sqlite3.Connection) -> tuple[list[sqlite3.Row], bool]:
            where, values = IS_SEEN, [owner, self._clock()]
            if purpose is not None:
                where, values = f"{where} AND purpose = ?", [*values, purpose]
            return page.select(connection, "files", where, *values)

        rows, has_more = await self._database.read(work)
        return [_reply(row) for row in rows], has_more

    async def get(self, file_id: str, owner: str) -> FileReply:
        """ApiError 404 for an id that is not there or not the owner's."""

        def work(connection: sqlite3.Connection) -> sqlite3.Row | None:
            sql = f"SELECT * FROM files WHERE id = ? AND {IS_SEEN}"
            row: sqlite3.Row | None = connection.execute(
                sql, (file_id, owner, self._clock())
            ).fetchone()
            return row

        row = await self._database.read(work)
        if row is None:
            raise ApiError(404, "there is no such file", code="file_not_found", param="file_id")
        return _reply(row)

    async def content_of(self, file_id: str, owner: str) -> tuple[Path, os.stat_result]:
        """Where a file's bytes are. ApiError 404 if somebody has taken them away."""
        path = self.path((await self.get(file_id, owner)).id)
        try:
            return path, await asyncio.to_thread(path.stat)
        except FileNotFoundError:
            log.error("%s: the bytes of a stored file are gone", path)
            text = "the file's bytes are gone from the server's disk; upload it again"
            raise ApiError(404, text, code="file_gone", param="file_id") from None
        except OSError as problem:
            raise StorageError.from_disk(problem, path) from None

    def path(self, file_id: str) -> Path:
        assert FILE_ID.fullmatch(file_id), "ids are made here"
        return self.folder / file_id

    async def delete(self, file_id: str, owner: str) -> None:
        """It is gone for its owner at once; its bytes when no batch reads them any more."""
        await self.get(file_id, owner)

        def work() -> None:
            self._database.do(
                lambda connection: connection.execute(
                    "UPDATE files SET expires_at = 0 WHERE id = ?", (file_id,)
                )
            )
            self.purge()

        await asyncio.to_thread(work)

    async def num_bytes(self) -> int:
        """Of all owners, uploads under way included."""
        return await self._database.read(lambda connection: _totals(connection)[1])

    def purge(self) -> None:
        """Removes what has expired."""
        self._drop_all()
        where = f"expires_at <= ? AND writer IS NULL AND NOT {IS_IN_USE}"
        self._remove(where, self._clock())

    def clean(self) -> None:
        """Removes what servers that ended in the middle left: a living one's is never touched."""
        names = {path.name for path in self.folder.iterdir() if FILE_ID.fullmatch(path.name)}
        rows = self._database.look(
            lambda connection: connection.execute("SELECT id, writer FROM files").fetchall()
        )
        for writer in {row["writer"] for row in rows} - {None, self._presence.name}:
            if self._presence.is_gone(writer):
                self._remove("writer = ?", writer)
        for row in rows:
            if row["writer"] is None and not self.path(row["id"]).exists():
                log.warning("the bytes of %s are gone: it is left out", row["id"])
                self._remove("id = ?", row["id"])
        # Listed before the rows, so their rows were there too, had nobody deleted them.
        self._unlink(names - {row["id"] for row in rows})

    def _reserve(self, new: NewFile, num_bytes: int | None) -> FileReply:
        """Adds the row, which only the writer knows until `show`; it counts towards the limits."""
        now = int(self._clock())
        reply = FileReply(
            id=ordered_id("file-"),
            bytes=num_bytes or 0,
            created_at=now,
            filename=new.name[:MAX_NAME_CHARACTERS],
            purpose=new.purpose,
            expires_at=None if new.seconds is None else now + new.seconds,
        )

        def work(connection: sqlite3.Connection) -> None:
            if num_bytes is not None:
                self._check_room(connection, num_bytes, new.owner)
            connection.execute(
                "INSERT INTO files (id, owner, name, purpose, num_bytes, created_at, expires_at, "
                "writer) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    reply.id,
                    new.owner,
                    reply.filename,
                    reply.purpose,
                    reply.bytes,
                    now,
                    reply.expires_at,
                    self._presence.name,
                ),
            )

        self._database.do(work)
        return reply

    def _check_room(self, connection: sqlite3.Connection, num_bytes: int, owner: str) -> None:
        """ApiError 429. A key has three times as much as is free at most, so that none takes all;
        without keys nobody's share is known.
        """
        num_files, total = _totals(connection)
        files_left = self._settings.max_files - num_files
        bytes_left = self._settings.max_stored_bytes - total - num_bytes
        is_full = files_left <= 0 or bytes_left < 0
        if owner and not is_full:
            own_files, own_bytes = _totals(connection, "WHERE owner = ?", owner)
            is_full = own_files >= FREE_PLACES_FACTOR * files_left
            is_full |= own_bytes + num_bytes > FREE_PLACES_FACTOR * bytes_left
        if is_full:
            text = "there is no room for more files; delete some"
            headers = {"retry-after": "60"}
            raise ApiError(429, text, code="storage_full", headers=headers)

    def _write(self, file_id: str, chunks: Iterable[bytes]) -> int:
        """How many they were, when they are on the disk."""
        path, written = self.path(file_id), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            with open(os.open(path, flags, 0o600), "wb") as file:
                for chunk in chunks:
                    written += file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            fsync_path(self.folder)
        except OSError as problem:
            # At once, for the row's removal needs room itself. Nobody has seen the file.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise StorageError.from_disk(problem, path) from None
        return written

    def _drop_all(self) -> None:
        for file_id in list(self._dropped):
            self._remove("id = ?", file_id)
            self._dropped.discard(file_id)

    def _remove(self, where: str, value: object) -> None:
        """The rows first: bytes without a row are seen by nobody."""
        found = f"SELECT id FROM files WHERE {where}"

        def find(connection: sqlite3.Connection) -> set[str]:
            return {row["id"] for row in connection.execute(found, (value,))}

        def delete(connection: sqlite3.Connection) -> set[str]:
            ids = find(connection)
            connection.executemany("DELETE FROM files WHERE id = ?", [(each,) for each in ids])
            return ids

        if self._database.look(find):
            self._unlink(self._database.do(delete))

    def _unlink(self, file_ids: set[str]) -> None:
        for file_id in file_ids:
            try:
                self.path(file_id).unlink(missing_ok=True)
            except OSError as problem:  # Windows: somebody reads it
                log.warning("%s stays for now: %s", file_id, problem)


def _totals(connection: sqlite3.Connection, where: str = "", *values: object) -> tuple[int, int]:
    """Files and bytes, of all owners unless `where` says which."""
    sql = f"SELECT COUNT(*), COALESCE(SUM(num_bytes), 0) FROM files {where}"
    row = connection.execute(sql, values).fetchone()
    return int(row[0]), int(row[1])


def _reply(row: sqlite3.Row) -> FileReply:
    return FileReply(
        id=row["id"],
        bytes=row["num_bytes"],
        created_at=row["created_at"],
        filename=row["name"],
        purpose=row["purpose"],
        expires_at=row["expires_at"],
    )
