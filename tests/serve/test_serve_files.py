"""How many files a store keeps, to the byte. Oracle: the limits themselves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from patience import HANG_SECONDS
from rorqual.serve.errors import ApiError
from rorqual.serve.files import FileStore
from rorqual.serve.settings import ServerSettings


@pytest.fixture
def store() -> Iterator[FileStore]:
    store = FileStore(ServerSettings(max_file_bytes=10, max_stored_bytes=14, max_files=3))
    yield store
    store.close()


def add(store: FileStore, num_bytes: int) -> str:
    return asyncio.run(store.add([bytes(num_bytes)], num_bytes, "a", "me")).id


def code_of(store: FileStore, num_bytes: int) -> str | None:
    with pytest.raises(ApiError) as caught:
        add(store, num_bytes)
    return caught.value.code


def test_limits_are_kept_to_the_byte(store: FileStore) -> None:
    assert code_of(store, 11) == "file_too_large"
    first = add(store, 10)
    assert code_of(store, 5) == "storage_full"
    add(store, 4)
    assert code_of(store, 1) == "storage_full"
    asyncio.run(store.delete(first, "me"))
    add(store, 5)
    add(store, 1)
    assert code_of(store, 1) == "storage_full"  # a fourth file, whatever its size
    assert store.num_bytes == 10


def test_uploads_under_way_count(store: FileStore) -> None:
    """Else many at once would together exceed what one alone may not."""
    may_go_on = threading.Event()

    def slowly() -> Iterator[bytes]:
        assert may_go_on.wait(HANG_SECONDS)
        yield bytes(9)

    async def test() -> None:
        upload = asyncio.create_task(store.add(slowly(), 9, "a", "me"))  # type: ignore[arg-type]
        await asyncio.sleep(0)  # it has begun, and writes in a thread
        try:
            with pytest.raises(ApiError, match="no room"):
                await store.add([bytes(6)], 6, "b", "me")
        finally:
            may_go_on.set()
            await upload

    asyncio.run(test())
    assert store.num_bytes == 9


def test_an_upload_that_fails_gives_its_room_back(store: FileStore) -> None:
    """Also one whose client leaves."""

    def broken() -> Iterator[bytes]:
        yield bytes(4)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        asyncio.run(store.add(broken(), 9, "a", "me"))  # type: ignore[arg-type]
    assert store.num_bytes == 0

    async def cancelled() -> None:
        is_writing, may_go_on = threading.Event(), threading.Event()

        def slowly() -> Iterator[bytes]:
            is_writing.set()
            assert may_go_on.wait(HANG_SECONDS)
            yield bytes(9)

        upload = asyncio.create_task(store.add(slowly(), 9, "a", "me"))  # type: ignore[arg-type]
        await asyncio.to_thread(is_writing.wait, HANG_SECONDS)
        upload.cancel()
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await upload

    asyncio.run(cancelled())
    assert store.num_bytes == 0
    assert add(store, 10)
