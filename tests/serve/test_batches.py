"""How a batch's workers end: one that fails ends the others, a cancel ends those that wait; and how
a batch goes on in another server.

Oracle: the requests that reach a stand-in for the engine, which a test fails, holds and lets go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from batch_stage import ANSWER, CHAT, Answer, Stages, line_of

from rorqual.engine import EngineFailed, EngineOverloaded
from rorqual.serve import batch_job, batch_lines, batches
from rorqual.serve.errors import ApiError, too_slow
from rorqual.serve.store import Page, StorageError


def test_a_worker_that_fails_ends_the_others_before_the_files_close(
    stages: Stages,
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault of ours ends it: the other's answer never comes, and what was stored stays."""
    ended: list[str] = []
    record = batch_job.record_of

    def full(custom_id: str, *rest: Any) -> bytes:
        if custom_id == "bad":
            raise ValueError("a fault of ours")
        return record(custom_id, *rest)

    async def run() -> None:
        stage, is_held = stages(2), asyncio.Event()

        async def answer(question: str) -> str:
            if question == "held":
                is_held.set()
                try:
                    await asyncio.Event().wait()  # for ever
                finally:
                    ended.append(question)
            if question == "bad":
                await is_held.wait()
            return ANSWER

        answering(answer)
        monkeypatch.setattr(batch_job, "record_of", full)
        reply = await stage.ended(await stage.begin("good", "held", "bad", "never"))
        assert ended == ["held"]
        assert reply.status == "failed"
        assert reply.errors is not None
        assert stage.said(reply.output_file_id) == ["good"]
        assert len(asyncio.all_tasks()) == 1
        assert (reply.request_counts.completed, reply.request_counts.total) == (1, 4)

    asyncio.run(run())


def test_an_engine_that_failed_leaves_the_batch_to_the_next_server(
    stages: Stages, answering: Callable[[Answer], None]
) -> None:
    """Its other lines were not answered, so the batch has not ended; the answers before stay."""
    asked: list[str] = []
    is_well = False

    async def run() -> None:
        stage = stages(1)

        async def answer(question: str) -> str:
            asked.append(question)
            if question == "bad" and not is_well:
                raise EngineFailed("the engine has failed", fix="start it again")
            return ANSWER

        answering(answer)
        batch_id = await stage.begin("good", "bad", "last")
        reply = await stage.ended(batch_id)
        assert reply.status == "in_progress"
        assert (reply.request_counts.completed, reply.request_counts.failed) == (1, 0)
        await stage.batches.look_after()  # it does not take up its own again
        assert asked == ["good", "bad"]
        nonlocal is_well
        is_well = True
        await stage.batches.close()
        other = stages(1)
        await other.batches.look_after()
        reply = await other.ended(batch_id)
        assert reply.status == "completed"
        assert other.said(reply.output_file_id) == ["good", "bad", "last"]
        assert asked == ["good", "bad", "bad", "last"]

    asyncio.run(run())


def test_a_line_that_waits_for_the_queue_does_not_begin_after_a_cancel(
    stages: Stages,
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cancel comes while the worker waits to ask again."""
    monkeypatch.setattr(batch_job, "FULL_QUEUE_SECONDS", 0)
    asked: list[str] = []

    async def run() -> None:
        stage = stages(1)

        async def answer(question: str) -> str:
            asked.append(question)
            if len(asked) == 1:
                batch_id = (await stage.batches.page("me", Page(1)))[0][0].id
                assert (await stage.batches.cancel(batch_id, "me")).status == "cancelling"
                raise EngineOverloaded("too many answers are open")
            return ANSWER

        answering(answer)
        reply = await stage.ended(await stage.begin("one", "two"))
        assert asked == ["one"]
        assert reply.status == "cancelled"
        assert (reply.request_counts.completed, reply.request_counts.failed) == (0, 0)

    asyncio.run(run())


def test_a_line_that_waits_for_room_does_not_begin_after_a_cancel(
    stages: Stages, answering: Callable[[Answer], None]
) -> None:
    """Another batch has all the room until the cancel has come."""
    asked: list[str] = []

    async def run() -> None:
        stage, has_room, may_go_on = stages(1), asyncio.Event(), asyncio.Event()

        async def answer(question: str) -> str:
            asked.append(question)
            has_room.set()
            await may_go_on.wait()
            return ANSWER

        answering(answer)
        first = await stage.begin("first")
        await has_room.wait()
        second = await stage.begin("second")
        while not stage.batches._places.lines.num_waiting:
            await asyncio.sleep(0.01)
        assert (await stage.batches.cancel(second, "me")).status == "cancelling"
        may_go_on.set()
        ends = (await stage.ended(first)).status, (await stage.ended(second)).status
        assert asked == ["first"]
        assert ends == ("completed", "cancelled")

    asyncio.run(run())


def test_an_answer_that_takes_too_long_is_its_lines_failure(
    stages: Stages, answering: Callable[[Answer], None]
) -> None:
    """The lines behind it are answered; each moment of the batch has its time."""

    async def run() -> None:
        stage = stages(1)

        async def answer(question: str) -> str:
            if question == "slow":
                raise too_slow(4)
            return ANSWER

        answering(answer)
        reply = await stage.ended(await stage.begin("slow", "quick"))
        assert reply.status == "completed"
        counts = reply.request_counts
        assert (counts.total, counts.completed, counts.failed) == (2, 1, 1)
        assert stage.said(reply.output_file_id) == ["quick"]
        [record] = stage.records(reply.error_file_id)
        assert record["custom_id"] == "slow"
        assert record["response"]["status_code"] == 504
        times = (reply.in_progress_at, reply.finalizing_at, reply.completed_at)
        assert None not in times
        assert (reply.failed_at, reply.cancelling_at, reply.cancelled_at) == (None, None, None)
        assert (await stage.batches.cancel(reply.id, "me")).status == "completed"

    asyncio.run(run())


def test_a_batch_without_failures_has_no_file_of_them(
    stages: Stages, answering: Callable[[Answer], None]
) -> None:
    async def run() -> None:
        stage = stages(2)

        async def answer(question: str) -> str:
            return ANSWER

        answering(answer)
        first = await stage.begin("one")
        second = await stage.begin("two", "three")
        assert (await stage.ended(first)).error_file_id is None
        replies, has_more = await stage.batches.page("me", Page(10))
        assert ([reply.id for reply in replies], has_more) == ([second, first], False)
        assert await stage.batches.page("other", Page(10)) == ([], False)
        assert (await stage.get(second)).request_counts.completed == 2

    asyncio.run(run())


def test_a_disk_that_fails_behind_a_batchs_end_costs_no_answer(
    stages: Stages, answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are in their file, and some are forgotten: it is not made a second time."""
    monkeypatch.setattr(batch_job, "STORAGE_SECONDS", 0)

    async def run() -> None:
        stage = stages(1)
        store = stage.store

        def fail(batch_id: str) -> None:
            first = "DELETE FROM answers WHERE line = 1"
            if store.database.do(lambda connection: connection.execute(first)).rowcount:
                raise StorageError(503, "the server's disk is full", code="disk_full")

        async def answer(question: str) -> str:
            return ANSWER

        answering(answer)
        batch_id = await stage.begin("one", "two")
        monkeypatch.setattr(store, "forget", fail)
        reply = await stage.ended(batch_id)
        assert reply.status == "completed"
        assert stage.said(reply.output_file_id) == ["one", "two"]
        assert store.database.look(store.batches.forgotten) == [batch_id]
        monkeypatch.undo()
        store.recover()
        assert store.database.look(store.batches.forgotten) == []

    asyncio.run(run())


def test_so_many_batches_run_and_the_oldest_that_ended_goes(
    stages: Stages,
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that runs is never forgotten, however old: then the newest is refused."""
    monkeypatch.setattr(batches, "MAX_BATCHES", 2)

    async def run() -> None:
        stage, may_go_on = stages(1), asyncio.Event()

        async def answer(question: str) -> str:
            await may_go_on.wait()
            return ANSWER

        answering(answer)
        first, second = await stage.begin("one"), await stage.begin("two")
        with pytest.raises(ApiError) as caught:
            await stage.begin("three")
        assert (caught.value.status, caught.value.code) == (429, "too_many")
        may_go_on.set()
        await stage.batches.drain()
        third = await stage.begin("three")
        replies, _ = await stage.batches.page("me", Page(10))
        assert [reply.id for reply in replies] == [third, second]
        with pytest.raises(ApiError):
            await stage.get(first)
        await stage.batches.drain()

    asyncio.run(run())


def test_who_has_the_most_batches_makes_room(
    stages: Stages, answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCHES", 3)

    async def run() -> None:
        stage = stages(1)

        async def answer(question: str) -> str:
            return ANSWER

        answering(answer)
        mine = await stage.begin("one")
        await stage.batches.drain()
        for _ in range(4):
            await stage.begin("one", owner="flood")
            await stage.batches.drain()
        assert (await stage.get(mine)).status == "completed"
        assert len((await stage.batches.page("flood", Page(10)))[0]) == 2

    asyncio.run(run())


@pytest.mark.parametrize("excess", [0, 1])
def test_a_line_may_be_as_long_as_a_body(excess: int) -> None:
    raw, seen = line_of("q"), set[bytes]()
    fault = batch_lines.fault_of(raw, CHAT, seen, len(raw) - excess)
    assert (fault and fault.code) == ("line_too_long" if excess else None)
    assert len(seen) == 1 - excess
    if not excess:
        again = batch_lines.fault_of(raw, CHAT, seen, len(raw))
        assert again is not None
        assert again.code == "duplicate_custom_id"
