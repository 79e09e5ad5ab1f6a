"""The database opens, migrates and fails as it should. Oracle: SQLite itself, and its files."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from stored import opened

from rorqual.errors import UsageError
from rorqual.serve.store import Database, StorageError, check_folder, database, default_folder
from rorqual.serve.store.files import NewFile


def write(db: Database, file_id: str) -> None:
    """A row of a file."""
    db.do(
        lambda connection: connection.execute(
            "INSERT INTO files (id, owner, name, purpose, num_bytes, created_at) "
            "VALUES (?, '', '', 'batch', 0, 0)",
            (file_id,),
        )
    )


def rows(db: Database) -> list[str]:
    return [row["id"] for row in db.rows("SELECT id FROM files ORDER BY id")]


def version(path: Path) -> Any:
    with sqlite3.connect(path) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


def test_an_empty_database_becomes_one_of_the_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    sqlite3.connect(path).close()  # version 0
    first = Database(path)
    write(first, "x")
    first.close()
    assert version(path) == len(database.SCHEMAS)
    again = Database(path)
    assert rows(again) == ["x"]
    again.close()


def test_an_older_version_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    old = Database(path)
    write(old, "x")
    old.close()
    next_version = "ALTER TABLE files ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue';\n"
    monkeypatch.setattr(database, "SCHEMAS", (*database.SCHEMAS, next_version))
    new = Database(path)
    [row] = new.rows("SELECT * FROM files")
    assert (row["id"], row["colour"]) == ("x", "blue")
    new.close()
    assert version(path) == len(database.SCHEMAS)


def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.db"
    Database(path).close()
    before = version(path)
    broken = "ALTER TABLE files ADD COLUMN colour TEXT;\nCREATE NONSENSE;\n"
    monkeypatch.setattr(database, "SCHEMAS", (*database.SCHEMAS, broken))
    with pytest.raises(UsageError, match="cannot be opened"):
        Database(path)
    monkeypatch.undo()
    assert version(path) == before
    again = Database(path)
    assert "colour" not in {row["name"] for row in again.rows("PRAGMA table_info(files)")}
    again.close()


def test_a_newer_or_a_foreign_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    newer, foreign = tmp_path / "newer.db", tmp_path / "foreign.db"
    Database(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    for path, words in ((newer, "newer rorqual"), (foreign, "another program")):
        with pytest.raises(UsageError, match=words) as caught:
            Database(path)
        assert caught.value.where == path
        assert caught.value.fix is not None
    assert (version(newer), version(foreign)) == (99, 0)


@pytest.mark.parametrize("damage", ["text", "header", "page"])
def test_a_damaged_database_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rorqual.db"
    db = Database(path)
    for number in range(300):
        write(db, str(number))
    db.close()
    data = bytearray(path.read_bytes())
    if damage == "text":
        data = bytearray(b"no database at all, but a letter" * 100)
    elif damage == "header":
        data[:16] = bytes(16)
    else:
        data[100:] = b"\xff" * (len(data) - 100)  # the header stands, what it describes is gone
    path.write_bytes(data)
    with pytest.raises(UsageError, match="is damaged, or no database") as caught:
        check_folder(tmp_path)
    assert str(path) in str(caught.value)


def test_damage_that_shows_later_is_no_crash(tmp_path: Path) -> None:
    with opened(tmp_path) as store:

        def fail(connection: sqlite3.Connection) -> None:
            problem = sqlite3.DatabaseError("database disk image is malformed")
            problem.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise problem

        with pytest.raises(StorageError) as caught:
            store.database.do(fail)
    assert (caught.value.status, caught.value.code) == (500, "storage_damaged")


FULL, BUSY = (503, "disk_full"), (503, "storage_busy")
FAILED, DAMAGED = (503, "storage_failed"), (500, "storage_damaged")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (sqlite3.SQLITE_FULL, FULL),
        (sqlite3.SQLITE_BUSY, BUSY),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, BUSY),
        (sqlite3.SQLITE_BUSY_RECOVERY, BUSY),
        (sqlite3.SQLITE_LOCKED_SHAREDCACHE, BUSY),
        (sqlite3.SQLITE_IOERR_FSYNC, FAILED),
        (sqlite3.SQLITE_CORRUPT_INDEX, DAMAGED),
        (sqlite3.SQLITE_NOTADB, DAMAGED),
        (-errno.ENOSPC, FULL),
        (-errno.EDQUOT, FULL),
        (-errno.EIO, FAILED),
        (-errno.EACCES, FAILED),
    ],
)
def test_what_the_disk_says_is_told(tmp_path: Path, code: int, told: tuple[int, str]) -> None:
    """SQLite's codes say more in their upper bits; below zero it is the system's own."""
    problem: OSError | sqlite3.OperationalError = OSError(-code, "no")
    if code > 0:
        problem = sqlite3.OperationalError("no")
        problem.sqlite_errorcode = code
    error = StorageError.from_disk(problem, tmp_path)
    assert (error.status, error.code) == told
    assert ("retry-after" in error.headers) == (error.status == 503)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (sqlite3.SQLITE_CORRUPT_INDEX, "is damaged"),
        (sqlite3.SQLITE_NOTADB, "is damaged"),
        (sqlite3.SQLITE_CANTOPEN, "cannot be opened"),
        (sqlite3.SQLITE_BUSY_RECOVERY, "cannot be opened"),
    ],
)
def test_why_a_database_does_not_open_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def fail(db: Database) -> None:
        problem = sqlite3.OperationalError("no")
        problem.sqlite_errorcode = code
        raise problem

    monkeypatch.setattr(Database, "_prepare", fail)
    with pytest.raises(UsageError, match=words) as caught:
        Database(tmp_path / "a.db")
    assert "a.db" in str(caught.value)


def test_work_is_done_whole_or_not_at_all(tmp_path: Path) -> None:
    db = Database(tmp_path / "a.db")

    def half(connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO files (id, owner, name, purpose, num_bytes, created_at) "
            "VALUES ('half', '', '', '', 0, 0)"
        )
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        db.do(half)
    write(db, "whole")
    assert rows(db) == ["whole"]
    db.close()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite's own limit of pages stands for the disk."""
    with opened(tmp_path) as store:
        db = store.database
        write(db, "before")
        num_pages = db.look(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
        db._connection.execute(f"PRAGMA max_page_count = {num_pages + 2}")
        with pytest.raises(StorageError) as caught:
            write(db, "x" * 100_000)
        assert (caught.value.status, caught.value.code) == (503, "disk_full")
        assert "retry-after" in caught.value.headers
        assert rows(db) == ["before"]
        db._connection.execute(f"PRAGMA max_page_count = {num_pages + 1000}")
        write(db, "x" * 100_000)
        new = NewFile(name="a", owner="me")
        assert asyncio.run(store.files.add([b"1"], 1, new)).bytes == 1


def test_another_servers_transaction_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading waits for nobody."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    first, second = Database(tmp_path / "a.db"), Database(tmp_path / "a.db")
    write(first, "1")
    first._connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError) as caught:
        write(second, "2")
    assert (caught.value.status, caught.value.code) == (503, "storage_busy")
    assert second.look(lambda c: c.execute("SELECT COUNT(*) FROM files").fetchone()[0]) == 1
    first._connection.execute("ROLLBACK")
    write(second, "2")
    assert rows(first) == ["1", "2"]
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_STATE_HOME": "/state"}, "/state/rorqual"),
        ("linux", {"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/rorqual"),
        ("linux", {}, "/home/me/.local/state/rorqual"),
        ("darwin", {}, "/home/me/Library/Application Support/rorqual"),
        ("darwin", {"XDG_STATE_HOME": "/state"}, "/state/rorqual"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/rorqual"),
        ("win32", {}, "/home/me/AppData/Local/rorqual"),
    ],
)
def test_the_default_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert default_folder() == Path(expected)


@pytest.mark.parametrize("name", ["files", "servers"])
def test_what_stands_in_a_folders_place_shows_before_a_model_is_loaded(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match="something of this name already"):
        check_folder(tmp_path)
