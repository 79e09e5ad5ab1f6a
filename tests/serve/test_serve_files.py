"""What a store of files keeps, shows and removes. Oracle: the limits and the rules, by hand."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import DAY, HOUR, Clock, opened

from patience import HANG_SECONDS
from rorqual.serve.errors import ApiError
from rorqual.serve.store import FileStore, NewFile, Page, StorageError, Store

ALL = Page(10_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    limits = {"max_file_bytes": 10, "max_stored_bytes": 14, "max_files": 3}
    with opened(tmp_path / "state", clock, **limits) as store:
        yield store


@pytest.fixture
def files(store: Store) -> FileStore:
    return store.files


def add(
    files: FileStore, data: bytes | Iterator[bytes], num_bytes: int | None = None, **new: Any
) -> str:
    whole = isinstance(data, bytes)
    values = {"name": "a", "owner": "me"} | new
    reply = asyncio.run(
        files.add([data] if whole else data, num_bytes or len(data), NewFile(**values))  # type: ignore[list-item, arg-type]
    )
    return reply.id


def ids(files: FileStore, page: Page = ALL, owner: str = "me", purpose: str | None = None) -> Any:
    return [reply.id for reply in asyncio.run(files.page(owner, page, purpose))[0]]


def num_bytes(files: FileStore) -> int:
    return asyncio.run(files.num_bytes())


def status_of(work: Any) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as caught:
        work()
    return caught.value.status, caught.value.code


def is_there(files: FileStore, file_id: str, owner: str = "me") -> bool:
    try:
        asyncio.run(files.get(file_id, owner))
    except ApiError as problem:
        return (problem.status, problem.param) != (404, "file_id")
    return True


def test_limits_are_kept_to_the_byte(files: FileStore) -> None:
    assert status_of(lambda: add(files, bytes(11), owner="")) == (413, "file_too_large")
    first = add(files, bytes(10), owner="")
    assert status_of(lambda: add(files, bytes(5), owner="")) == (429, "storage_full")
    add(files, bytes(4), owner="")
    assert status_of(lambda: add(files, b"1", owner="")) == (429, "storage_full")
    asyncio.run(files.delete(first, ""))
    add(files, bytes(5), owner="")
    add(files, b"1", owner="")
    assert status_of(lambda: add(files, b"1", owner="")) == (429, "storage_full")  # a fourth file
    assert num_bytes(files) == 10


def test_no_key_takes_all_the_room(tmp_path: Path, clock: Clock) -> None:
    """Three times what is free at most, in files and in bytes; who comes later finds some."""
    limits = {"max_files": 16, "max_stored_bytes": 1600}
    with opened(tmp_path, clock, **limits) as store:
        for owner, most in (("a", 12), ("b", 3), ("c", 1)):
            for _ in range(most):
                add(store.files, b"1", owner=owner)
            if owner != "c":
                assert status_of(lambda: add(store.files, b"1", owner=owner)) == (  # noqa: B023
                    429, "storage_full",
                )  # fmt: skip
    with opened(tmp_path / "b", clock, **limits) as store:
        add(store.files, bytes(1200), owner="a")
        assert status_of(lambda: add(store.files, b"1", owner="a")) == (429, "storage_full")
        add(store.files, bytes(300), owner="b")


def test_uploads_under_way_count(files: FileStore) -> None:
    """Else many at once would together exceed what one alone may not; in any server."""
    is_writing, may_go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        is_writing.set()
        assert may_go_on.wait(HANG_SECONDS)
        yield bytes(9)

    async def test() -> None:
        upload = asyncio.create_task(files.add(slowly(), 9, NewFile(name="a", owner="me")))
        await asyncio.to_thread(is_writing.wait, HANG_SECONDS)
        try:
            with pytest.raises(ApiError, match="no room"):
                await files.add([bytes(6)], 6, NewFile(name="b", owner="me"))
            assert await files.page("me", ALL, None) == ([], False)  # but nobody sees it yet
        finally:
            may_go_on.set()
            await upload

    asyncio.run(test())
    assert num_bytes(files) == 9


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EIO, "storage_failed")]
)
def test_an_upload_that_fails_leaves_nothing(files: FileStore, number: int, code: str) -> None:
    kept = add(files, b"12")

    def broken() -> Iterator[bytes]:
        yield bytes(4)
        raise OSError(number, "it fails")

    assert status_of(lambda: add(files, broken(), 9, owner="")) == (503, code)
    assert num_bytes(files) == 2
    assert [path.name for path in files.folder.iterdir()] == ids(files) == [kept]


def test_an_upload_whose_client_leaves_is_not_kept(files: FileStore) -> None:
    async def cancelled() -> None:
        is_writing, may_go_on = threading.Event(), threading.Event()

        def slowly() -> Iterator[bytes]:
            is_writing.set()
            assert may_go_on.wait(HANG_SECONDS)
            yield bytes(9)

        upload = asyncio.create_task(files.add(slowly(), 9, NewFile(name="a", owner="me")))
        await asyncio.to_thread(is_writing.wait, HANG_SECONDS)
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        may_go_on.set()

    asyncio.run(cancelled())  # waits for its threads
    assert num_bytes(files) == 0
    assert list(files.folder.iterdir()) == []
    assert add(files, bytes(10))


def test_an_upload_that_fills_the_disk_gives_its_room_back_first(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal of its row needs room on the same disk: else that would be full for ever."""

    def full(*_: object) -> None:
        assert list(files.folder.iterdir()) == []
        raise StorageError(503, "full", code="disk_full")

    def broken() -> Iterator[bytes]:
        yield bytes(4)
        monkeypatch.setattr(files, "_drop_all", full)
        raise OSError(errno.ENOSPC, "it fails")

    assert status_of(lambda: add(files, broken(), 9)) == (503, "disk_full")
    assert list(files.folder.iterdir()) == []


def test_what_cannot_be_dropped_now_is_dropped_later(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is so full that not even the row can go."""

    def full(*_: object) -> None:
        raise StorageError(503, "full", code="disk_full")

    def broken() -> Iterator[bytes]:
        monkeypatch.setattr(files, "_remove", full)
        raise OSError(errno.ENOSPC, "no space")
        yield b""

    assert status_of(lambda: add(files, broken(), 9)) == (503, "disk_full")
    monkeypatch.undo()
    assert num_bytes(files) == 9
    files.purge()
    assert num_bytes(files) == 0
    assert list(files.folder.iterdir()) == []


def test_a_name_is_kept_so_far_and_never_a_path(files: FileStore) -> None:
    file_id = add(files, b"1\n23", name="../" * 100)
    assert asyncio.run(files.get(file_id, "me")).filename == ("../" * 100)[:200]
    assert asyncio.run(files.content_of(file_id, "me"))[0] == files.folder / file_id
    assert (files.folder / file_id).read_bytes() == b"1\n23"


def test_bytes_that_somebody_took_away_are_a_404(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails is none."""
    file_id = add(files, b"1234")
    path, found = asyncio.run(files.content_of(file_id, "me"))
    assert found.st_size == 4
    path.unlink()
    assert status_of(lambda: asyncio.run(files.content_of(file_id, "me"))) == (404, "file_gone")

    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, "cannot be read")

    monkeypatch.setattr(Path, "stat", fail)
    answer = status_of(lambda: asyncio.run(files.content_of(file_id, "me")))
    assert answer == (503, "storage_failed")


def test_pages(files: FileStore) -> None:
    """Also behind a file that is not there any more: `for file in files: delete(file)` works."""
    first, second, third = (
        add(files, b"1", purpose="evals" if number == 1 else "batch") for number in range(3)
    )
    assert ids(files) == [third, second, first]
    assert ids(files, Page(10, order="asc")) == [first, second, third]
    assert ids(files, Page(10, after=third)) == [second, first]
    assert ids(files, Page(10, after=first, order="asc")) == [second, third]
    assert ids(files, purpose="evals") == [second]
    assert ids(files, purpose="no such") == []
    assert ids(files, owner="other") == []
    for limit, has_more in ((1, True), (2, True), (3, False), (4, False)):
        page = asyncio.run(files.page("me", Page(limit), None))
        assert (len(page[0]), page[1]) == (min(limit, 3), has_more)
    asyncio.run(files.delete(second, "me"))
    assert ids(files, Page(10, after=second)) == [first]


def test_what_another_owner_may_not(files: FileStore) -> None:
    file_id = add(files, b"1234")
    assert not is_there(files, file_id, "other")
    assert status_of(lambda: asyncio.run(files.content_of(file_id, "other")))[0] == 404
    assert status_of(lambda: asyncio.run(files.delete(file_id, "other")))[0] == 404
    assert is_there(files, file_id)


def test_a_file_expires_on_time(store: Store, files: FileStore, clock: Clock) -> None:
    kept, short = add(files, b"1"), add(files, b"12", seconds=HOUR)
    assert asyncio.run(files.get(short, "me")).expires_at == int(clock()) + HOUR
    assert asyncio.run(files.get(kept, "me")).expires_at is None
    clock.advance(HOUR - 1)
    store.clean()
    assert is_there(files, short)
    clock.advance(1)
    assert not is_there(files, short)  # before anybody cleans
    assert ids(files) == [kept]
    assert (files.folder / short).exists()
    store.clean()
    assert [path.name for path in files.folder.iterdir()] == [kept]
    assert num_bytes(files) == 1


def test_what_has_expired_makes_room(files: FileStore, clock: Clock) -> None:
    for _ in range(3):
        add(files, b"1", seconds=HOUR)
    assert status_of(lambda: add(files, b"1")) == (429, "storage_full")
    clock.advance(DAY)
    assert ids(files) == []
    assert add(files, b"1")


def test_what_a_batch_wrote_is_a_file_of_any_size(store: Store, files: FileStore) -> None:
    new = NewFile(name="out.jsonl", owner="me", purpose="batch_output")
    staged = files.stage([bytes(20), bytes(20)], new)
    assert (staged.bytes, ids(files)) == (40, [])
    store.database.do(lambda connection: files.show(connection, staged.id))
    assert ids(files) == [staged.id]
    assert asyncio.run(files.get(staged.id, "me")) == staged


def test_files_last(store: Store, files: FileStore, tmp_path: Path, clock: Clock) -> None:
    file_id = add(files, b"1\n23", seconds=DAY)
    before = asyncio.run(files.get(file_id, "me"))
    store.close()
    with opened(tmp_path / "state", clock) as again:
        again.recover()
        assert asyncio.run(again.files.get(file_id, "me")) == before
        assert again.files.path(file_id).read_bytes() == b"1\n23"


def test_nobody_else_on_the_machine_may_read_them(store: Store, files: FileStore) -> None:
    file_id = add(files, b"1")
    for path in (store.folder, *store.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.parent.name != "servers":  # locks without content, in a private folder
            assert mode & 0o077 == 0, (path, oct(mode))
    assert stat.S_IMODE((files.folder / file_id).stat().st_mode) == 0o600
    assert {path.name for path in store.folder.glob("rorqual.db*")} == {
        "rorqual.db",
        "rorqual.db-shm",
        "rorqual.db-wal",
    }


def test_orphans_go_at_the_start_and_a_living_servers_work_stays(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as living, opened(tmp_path / "state") as dead:
        kept, lost = add(living.files, b"1"), add(living.files, b"2")
        staged = living.files.stage([b"3"], NewFile(name="a", owner="me"))
        left = dead.files.stage([b"4"], NewFile(name="a", owner="me"))
        dead.presence.close()  # as the system does for a process that is killed
        (living.files.folder / lost).unlink()
        without_row = living.files.folder / f"file-{'0' * 30}"
        without_row.write_bytes(b"5")
        foreign = living.files.folder / "notes.txt"
        foreign.write_text("not ours", encoding="utf-8")
        with opened(tmp_path / "state") as fresh:
            fresh.recover()
            names = {path.name for path in living.files.folder.iterdir()}
            assert names == {kept, staged.id, foreign.name}
            assert ids(fresh.files) == [kept]
            assert left.id not in names
            locks = {path.stem for path in (tmp_path / "state" / "servers").iterdir()}
            assert locks == {living.presence.name, fresh.presence.name}
            living.database.do(lambda connection: living.files.show(connection, staged.id))
            assert ids(fresh.files) == [staged.id, kept]


def test_a_temporary_folder_goes_with_the_server() -> None:
    with opened(None) as store:
        folder = store.folder
        assert folder.stat().st_mode & 0o077 == 0
        add(store.files, b"1")
    assert not folder.exists()
    assert not os.path.lexists(folder)
