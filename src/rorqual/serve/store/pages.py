"""A page of a list, as OpenAI's clients ask for it: `limit`, `after`, `order`."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Page:
    """`after` is the id of the last one that the client has; it need not be there any more."""

    limit: int
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"

    def select(
        self, connection: sqlite3.Connection, table: str, where: str, *values: object
    ) -> tuple[list[sqlite3.Row], bool]:
        """The rows that `where` lets through, and whether there are more behind them.

        Ids sort by the time of their making, so order and place need nothing else.
        """
        sign, order = ("<", "DESC") if self.order == "desc" else (">", "ASC")
        sql = f"SELECT * FROM {table} WHERE ({where})"
        if self.after is not None:
            sql, values = f"{sql} AND id {sign} ?", (*values, self.after)
        sql = f"{sql} ORDER BY id {order} LIMIT ?"
        rows = connection.execute(sql, (*values, self.limit + 1)).fetchall()
        return rows[: self.limit], len(rows) > self.limit
