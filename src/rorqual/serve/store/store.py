"""All that outlasts the server, opened and closed together."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable

from rorqual.serve.settings import ServerSettings
from rorqual.serve.store.batch_table import BatchTable
from rorqual.serve.store.database import Database
from rorqual.serve.store.files import FileStore
from rorqual.serve.store.folder import DATABASE, Presence, open_folder
from rorqual.serve.store.responses import ResponseStore

FREED_PAGES = 1000


class Store:
    """Files, batches and responses in the folder of `settings.state_dir`.

    Several servers may have it open. `clock` is the time in seconds since 1970.
    """

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.time) -> None:
        """UsageError if the folder or its database cannot be used."""
        self.clock = clock
        self._is_temporary = settings.state_dir is None
        self.folder = open_folder(settings.state_dir)
        self.database = Database(self.folder / DATABASE)
        self.presence = Presence(self.folder)
        self.files = FileStore(self.database, self.folder, self.presence, settings, clock)
        self.batches = BatchTable()
        self.responses = ResponseStore(self.database, settings, clock)

    def recover(self) -> None:
        """At the start, in a thread: removes what servers that were killed left behind."""
        self.files.clean()
        self.presence.clean()
        for batch_id in self.database.look(self.batches.forgotten):
            self.forget(batch_id)
        self.clean()

    def clean(self) -> None:
        """Now and then, in a thread: removes what has expired."""
        self.files.purge()
        if self.database.look(self.responses.has_expired):
            self.database.do(self.responses.purge)

    def forget(self, batch_id: str) -> None:
        """Removes the answers of a batch that has ended, in a thread."""
        while self.database.do(lambda connection: self.batches.forget(connection, batch_id)):
            pass
        while self.database.do(_free):
            pass

    def close(self) -> None:
        self.database.close()
        self.presence.close()
        self.remove_temporary()

    def remove_temporary(self) -> None:
        """Removes a folder that goes with the server."""
        if self._is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def _free(connection: sqlite3.Connection) -> bool:
    """Gives some pages that are free back to the disk; whether there were any."""
    num_free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    connection.execute(f"PRAGMA incremental_vacuum({FREED_PAGES})").fetchall()
    return bool(num_free)
