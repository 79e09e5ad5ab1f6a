"""The rows of batches and of their lines' answers.

A batch belongs to one living server, its `runner`, and only that one may change it: a server that
was taken for dead finds that it is the runner no more, and ends quietly. An answer and the counts
that it changes are one transaction, and a line has at most one answer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rorqual.serve.errors import ApiError
from rorqual.serve.schemas_batches import BatchReply, BatchStatus
from rorqual.serve.store.database import Database
from rorqual.serve.store.pages import Page

RUNNING: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")
IS_RUNNING = f"status IN {RUNNING}"
FORGOTTEN_AT_ONCE = 500
"""Answers of a batch that has ended; a few at a time, since others wait."""


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """A batch as it is kept.

    It is `model`'s alone. `num_starts` counts how often a server took it over since its last
    answer; the files of its answers last `output_seconds`, None: for ever.
    """

    reply: BatchReply
    owner: str
    model: str
    runner: str | None
    output_seconds: int | None = None
    num_starts: int = 0


class LostError(Exception):
    """Another server runs this batch now."""


class BatchTable:
    """Each method is work for `Database.run`, but for `records`."""

    def insert(self, connection: sqlite3.Connection, row: BatchRow, max_batches: int) -> None:
        """ApiError 429 if `max_batches` run. Else the oldest that has ended makes room, of the
        owner who has the most: nobody's flood costs another theirs.
        """
        while connection.execute("SELECT COUNT(*) FROM batches").fetchone()[0] >= max_batches:
            ended = f"SELECT %s FROM batches WHERE NOT {IS_RUNNING}"
            most = ended % "owner" + " GROUP BY owner ORDER BY COUNT(*) DESC LIMIT 1"
            oldest = ended % "id" + f" AND owner = ({most}) ORDER BY id LIMIT 1"
            if not connection.execute(f"DELETE FROM batches WHERE id = ({oldest})").rowcount:
                headers = {"retry-after": "60"}
                text = "too many batches are running"
                raise ApiError(429, text, code="too_many", headers=headers)
        reply = row.reply
        connection.execute(
            "INSERT INTO batches (id, owner, model, input_file_id, status, runner, "
            "output_seconds, reply) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                reply.id,
                row.owner,
                row.model,
                reply.input_file_id,
                reply.status,
                row.runner,
                row.output_seconds,
                reply.model_dump_json(),
            ),
        )

    def get(self, connection: sqlite3.Connection, batch_id: str, owner: str) -> BatchRow:
        """ApiError 404 for an id that is not there or not the owner's."""
        sql = "SELECT * FROM batches WHERE id = ? AND owner = ?"
        row = connection.execute(sql, (batch_id, owner)).fetchone()
        if row is None:
            raise ApiError(404, "there is no such batch", code="batch_not_found", param="batch_id")
        return _row(row)

    def page(
        self, connection: sqlite3.Connection, owner: str, page: Page
    ) -> tuple[list[BatchReply], bool]:
        rows, has_more = page.select(connection, "batches", "owner = ?", owner)
        return [_row(row).reply for row in rows], has_more

    def running(self, connection: sqlite3.Connection) -> list[BatchRow]:
        """Those that have not ended, of all owners, the oldest first."""
        sql = f"SELECT * FROM batches WHERE {IS_RUNNING} ORDER BY id"
        return [_row(row) for row in connection.execute(sql)]

    def take(self, connection: sqlite3.Connection, row: BatchRow, runner: str) -> BatchRow | None:
        """Makes `runner` its runner, if it still has the old one; the batch as it is now."""
        sql = (
            "UPDATE batches SET runner = ?, num_starts = num_starts + 1 "
            f"WHERE id = ? AND runner IS ? AND {IS_RUNNING}"
        )
        if not connection.execute(sql, (runner, row.reply.id, row.runner)).rowcount:
            return None
        return self.get(connection, row.reply.id, row.owner)

    def release(self, connection: sqlite3.Connection, runner: str) -> None:
        """Its batches are anybody's."""
        connection.execute("UPDATE batches SET runner = NULL WHERE runner = ?", (runner,))

    def cancel(
        self, connection: sqlite3.Connection, batch_id: str, owner: str, now: int
    ) -> BatchRow:
        """Asks the runner to end it; one that has ended, or is about to, stays as it is."""
        row = self.get(connection, batch_id, owner)
        if row.reply.status in ("validating", "in_progress"):
            changes = {"status": "cancelling", "cancelling_at": now}
            self._update(connection, row.reply.model_copy(update=changes))
        return self.get(connection, batch_id, owner)

    def change(
        self, connection: sqlite3.Connection, batch_id: str, runner: str, **changes: Any
    ) -> BatchReply:
        """Changes fields of the reply. LostError if it is not `runner`'s.

        A cancel is never undone by a status on the way.
        """
        sql = "SELECT * FROM batches WHERE id = ? AND runner = ?"
        found = connection.execute(sql, (batch_id, runner)).fetchone()
        if found is None:
            raise LostError
        reply = _row(found).reply
        if reply.status == "cancelling" and changes.get("status") in RUNNING:
            changes = {name: value for name, value in changes.items() if name != "status"}
        reply = reply.model_copy(update=changes)
        self._update(connection, reply)
        return reply

    def add_answer(
        self,
        connection: sqlite3.Connection,
        batch_id: str,
        runner: str,
        line: int,
        is_good: bool,
        record: bytes,
    ) -> BatchStatus:
        """The batch's status, which a cancel may have changed. LostError as in `change`."""
        sql = (
            "UPDATE batches SET num_completed = num_completed + ?, num_failed = num_failed + ?, "
            f"num_starts = 0 WHERE id = ? AND runner = ? AND {IS_RUNNING} RETURNING status"
        )
        values = (int(is_good), int(not is_good), batch_id, runner)
        found = connection.execute(sql, values).fetchall()
        if not found:
            raise LostError
        connection.execute(
            "INSERT INTO answers (batch_id, line, is_good, record) VALUES (?, ?, ?, ?)",
            (batch_id, line, int(is_good), record),
        )
        status: BatchStatus = found[0]["status"]
        return status

    def answered(self, connection: sqlite3.Connection, batch_id: str) -> set[int]:
        """The numbers of the lines that have their answer."""
        sql = "SELECT line FROM answers WHERE batch_id = ?"
        return {row["line"] for row in connection.execute(sql, (batch_id,))}

    def records(self, database: Database, batch_id: str, is_good: bool) -> Iterator[bytes]:
        """The answers in the order of the lines, one by one, for a thread."""
        sql = "SELECT record FROM answers WHERE batch_id = ? AND is_good = ? ORDER BY line"
        for row in database.rows(sql, batch_id, int(is_good)):
            yield row["record"]

    def forget(self, connection: sqlite3.Connection, batch_id: str) -> bool:
        """Removes some answers of a batch that has ended; whether there may be more of them."""
        some = "SELECT rowid FROM answers WHERE batch_id = ? LIMIT ?"
        sql = f"DELETE FROM answers WHERE rowid IN ({some})"
        return connection.execute(sql, (batch_id, FORGOTTEN_AT_ONCE)).rowcount > 0

    def forgotten(self, connection: sqlite3.Connection) -> list[str]:
        """Batches that have ended, or are not there any more, and still have answers."""
        sql = "SELECT DISTINCT batch_id FROM answers EXCEPT SELECT id FROM batches WHERE "
        return [row["batch_id"] for row in connection.execute(sql + IS_RUNNING)]

    def _update(self, connection: sqlite3.Connection, reply: BatchReply) -> None:
        sql = "UPDATE batches SET status = ?, reply = ? WHERE id = ?"
        connection.execute(sql, (reply.status, reply.model_dump_json(), reply.id))


def _row(row: sqlite3.Row) -> BatchRow:
    reply = BatchReply.model_validate_json(row["reply"])
    reply.request_counts.completed = row["num_completed"]
    reply.request_counts.failed = row["num_failed"]
    return BatchRow(
        reply=reply,
        owner=row["owner"],
        model=row["model"],
        runner=row["runner"],
        output_seconds=row["output_seconds"],
        num_starts=row["num_starts"],
    )
