"""Responses that a client asked to store, for `GET /v1/responses/{id}` and `previous_response_id`.

What a response is, its route knows: here it is a text of JSON with an owner and a predecessor. It
expires after `response_seconds`. When there are too many, or too many bytes, the oldest of the
owner who has the most makes room, so nobody's flood costs another theirs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from rorqual.serve.errors import ApiError
from rorqual.serve.settings import ServerSettings
from rorqual.serve.store.database import Database

MAX_CHAIN = 1000
MAX_CHAIN_BYTES = 64 * 2**20
"""They are all in memory at once."""


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """`body` is whatever JSON its route wants back."""

    id: str
    owner: str
    body: str
    previous_id: str | None = None


class ResponseStore:
    """Responses by id; an owner sees only their own. Make ids with `ordered_id("resp_")`."""

    def __init__(
        self, database: Database, settings: ServerSettings, clock: Callable[[], float]
    ) -> None:
        self._database, self._settings, self._clock = database, settings, clock

    async def put(self, response: StoredResponse) -> None:
        """Stores it, in the place of the owner's earlier one of that id. StorageError if it cannot
        be; ApiError 413 if it is longer than all that may be stored.
        """
        num_bytes = len(response.body.encode())
        settings, now = self._settings, int(self._clock())
        if num_bytes > settings.max_stored_response_bytes:
            text = "the response is too long to be stored; send `store: false`"
            raise ApiError(413, text, code="response_too_large", param="store")

        def work(connection: sqlite3.Connection) -> None:
            same = (response.id, response.owner)
            connection.execute("DELETE FROM responses WHERE id = ? AND owner = ?", same)
            self._make_room(connection, num_bytes)
            connection.execute(
                "INSERT INTO responses (id, owner, previous_id, created_at, expires_at, "
                "num_bytes, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    response.id,
                    response.owner,
                    response.previous_id,
                    now,
                    now + settings.response_seconds,
                    num_bytes,
                    response.body,
                ),
            )

        await self._database.run(work)

    async def get(self, response_id: str, owner: str) -> StoredResponse:
        """ApiError 404 for an id that is not there, has expired or is not the owner's."""
        found = await self._database.read(
            lambda connection: self._find(connection, response_id, owner)
        )
        if found is None:
            raise _not_found(response_id)
        return found

    async def delete(self, response_id: str, owner: str) -> None:
        """ApiError 404 as `get`. Those that follow it stay, and their `chain` is broken."""

        def work(connection: sqlite3.Connection) -> bool:
            sql = "DELETE FROM responses WHERE id = ? AND owner = ? AND expires_at > ?"
            values = (response_id, owner, self._clock())
            return connection.execute(sql, values).rowcount > 0

        if not await self._database.run(work):
            raise _not_found(response_id)

    async def chain(self, response_id: str, owner: str) -> list[StoredResponse]:
        """The response and all before it, the first one first.

        ApiError 400 `previous_response_not_found` if one of them is not there, or if they are more
        than 1,000; `context_length_exceeded` if they are longer than `MAX_CHAIN_BYTES`.
        """

        def work(connection: sqlite3.Connection) -> list[StoredResponse]:
            found: list[StoredResponse] = []
            num_bytes = 0
            next_id: str | None = response_id
            while next_id is not None:
                response = self._find(connection, next_id, owner)
                if response is None and not found:
                    raise _no_previous(f"there is no previous response {response_id[:100]!r}")
                if response is None:
                    raise _no_previous(
                        f"the conversation of {response_id!r} is not whole: its earlier response "
                        f"{next_id!r} was deleted, or has expired; send its items as input"
                    )
                if len(found) >= MAX_CHAIN:
                    raise _no_previous(
                        f"the conversation of {response_id!r} has more than {MAX_CHAIN} responses"
                    )
                num_bytes += len(response.body)
                if num_bytes > MAX_CHAIN_BYTES:
                    raise _too_long()
                found.append(response)
                next_id = response.previous_id
            return found[::-1]

        return await self._database.read(work)

    def has_expired(self, connection: sqlite3.Connection) -> bool:
        """Whether `purge` has anything to do."""
        sql = "SELECT EXISTS (SELECT 1 FROM responses WHERE expires_at <= ?)"
        return bool(connection.execute(sql, (self._clock(),)).fetchone()[0])

    def purge(self, connection: sqlite3.Connection) -> None:
        """Removes what has expired."""
        connection.execute("DELETE FROM responses WHERE expires_at <= ?", (self._clock(),))

    def _find(
        self, connection: sqlite3.Connection, response_id: str, owner: str
    ) -> StoredResponse | None:
        sql = "SELECT * FROM responses WHERE id = ? AND owner = ? AND expires_at > ?"
        row = connection.execute(sql, (response_id, owner, self._clock())).fetchone()
        if row is None:
            return None
        return StoredResponse(
            id=row["id"], owner=row["owner"], body=row["body"], previous_id=row["previous_id"]
        )

    def _make_room(self, connection: sqlite3.Connection, num_bytes: int) -> None:
        settings = self._settings
        sql = "SELECT COUNT(*), COALESCE(SUM(num_bytes), 0) FROM responses"
        most = "SELECT owner FROM responses GROUP BY owner ORDER BY SUM(num_bytes) DESC LIMIT 1"
        oldest = f"SELECT id FROM responses WHERE owner = ({most}) ORDER BY created_at, id LIMIT 1"
        while True:
            count, total = connection.execute(sql).fetchone()
            is_full = total + num_bytes > settings.max_stored_response_bytes
            if not is_full and count < settings.max_stored_responses:
                return
            if not connection.execute(f"DELETE FROM responses WHERE id = ({oldest})").rowcount:
                return


def _not_found(response_id: str) -> ApiError:
    text = f"there is no response {response_id[:100]!r}"
    return ApiError(404, text, code="response_not_found", param="response_id")


def _no_previous(text: str) -> ApiError:
    param = "previous_response_id"
    return ApiError(400, text, code="previous_response_not_found", param=param)


def _too_long() -> ApiError:
    text = f"the stored conversation is longer than {MAX_CHAIN_BYTES:,} bytes"
    param = "previous_response_id"
    return ApiError(400, text, code="context_length_exceeded", param=param)
