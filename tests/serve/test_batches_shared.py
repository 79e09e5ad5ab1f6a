"""Servers that share a folder, and what a batch meets on its way: ends of servers, full disks.

Oracle: the lines that reach the stand-in for the engine, and the files that come out.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from batch_stage import ANSWER, Answer, Stage, Stages
from stored import HOUR

from rorqual.serve import batch_job, batches
from rorqual.serve.errors import ApiError
from rorqual.serve.store import BatchTable, FileStore, Page

LINES = ["one", "two", "three", "four"]
PAGE = Page(100)
Answering = Callable[[Answer], None]


class Engine:
    """Answers that wait while their question is in `held`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: set[str] = set()
        self.has_held, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def answer(self, question: str) -> str:
        self.asked.append(question)
        if question in self.held:
            self.has_held.set()
            await self.may_go_on.wait()
        return ANSWER


@pytest.fixture
def engine(answering: Answering) -> Engine:
    engine = Engine()
    answering(engine.answer)
    return engine


async def kill(stage: Stage) -> None:
    """The server stops where it is, and others see that its lock is free."""
    for job in stage.batches._jobs.values():
        assert job.task is not None
        job.task.cancel()
    await stage.batches.drain()
    stage.die()


def test_what_a_killed_server_left_is_taken_over(stages: Stages, engine: Engine) -> None:
    """As long as it lives it is left alone; then the lines without an answer are answered."""

    async def run() -> None:
        first, second = stages(1), stages(1)
        engine.held = {"three"}
        batch_id = await first.begin(*LINES)
        await engine.has_held.wait()
        await second.batches.look_after()
        assert engine.asked == LINES[:3]
        assert (await second.get(batch_id)).request_counts.completed == 2  # seen by both
        await kill(first)
        engine.held = set()
        await second.batches.look_after()
        reply = await second.ended(batch_id)
        assert engine.asked == [*LINES[:3], *LINES[2:]]
        assert reply.status == "completed"
        assert second.said(reply.output_file_id) == LINES
        assert (reply.request_counts.completed, reply.request_counts.total) == (4, 4)
        assert not list(second.store.database.rows("SELECT * FROM answers"))

    asyncio.run(run())


def test_of_two_that_would_take_over_one_does(stages: Stages, engine: Engine) -> None:
    async def run() -> None:
        first, second, third = stages(1), stages(1), stages(1)
        engine.held = {"one"}
        batch_id = await first.begin(*LINES)
        await engine.has_held.wait()
        await kill(first)
        engine.held = set()
        await asyncio.gather(second.batches.look_after(), third.batches.look_after())
        await second.batches.drain()
        reply = await third.ended(batch_id)
        assert engine.asked == ["one", *LINES]
        assert third.said(reply.output_file_id) == LINES

    asyncio.run(run())


def test_a_server_that_was_taken_for_dead_cannot_answer_a_line_twice(
    stages: Stages, engine: Engine
) -> None:
    """On a file system without locks: the batch has one runner, and only it may write."""

    async def run() -> None:
        first, second = stages(1), stages(1)
        engine.held = {"two"}
        batch_id = await first.begin(*LINES)
        await engine.has_held.wait()
        first.die()  # so it seems
        engine.held = set()
        await second.batches.look_after()
        reply = await second.ended(batch_id)
        assert (reply.status, second.said(reply.output_file_id)) == ("completed", LINES)
        engine.may_go_on.set()
        await first.batches.drain()
        assert await second.get(batch_id) == reply
        assert second.said(reply.output_file_id) == LINES
        [output] = (await second.files.page("me", PAGE, "batch_output"))[0]
        assert output.id == reply.output_file_id

    asyncio.run(run())


def test_a_server_that_lost_a_batch_begins_no_more_of_its_lines(
    stages: Stages, engine: Engine
) -> None:
    async def run() -> None:
        first, second = stages(1), stages(1)
        engine.held = {"two"}
        await first.begin(*LINES)
        await engine.has_held.wait()
        first.die()
        await second.batches.look_after()
        await first.batches.look_after()
        engine.may_go_on.set()
        await first.batches.drain()
        await second.batches.drain()
        assert sorted(engine.asked) == sorted([*LINES, "two"])

    asyncio.run(run())


def test_a_batch_is_its_models_alone(stages: Stages, engine: Engine) -> None:
    """A server of another name waits; one whose alias it is goes on; a cancel needs no model."""

    async def run() -> None:
        first = stages(1, name="fin")
        engine.held = {"two", "x"}
        batch_id = await first.begin(*LINES)
        await engine.has_held.wait()
        other_id = await first.begin("x")
        await kill(first)
        other = stages(1, name="blue")
        await other.batches.look_after()
        assert (await other.ended(batch_id)).status == "in_progress"
        assert engine.asked == LINES[:2]
        assert (await other.batches.cancel(other_id, "me")).status == "cancelling"
        assert (await other.ended(other_id)).status == "cancelled"
        engine.held = set()
        same = stages(1, name="fin")
        await same.batches.look_after()
        reply = await same.ended(batch_id)
        assert reply.model == "fin"
        assert (reply.status, same.said(reply.output_file_id)) == ("completed", LINES)

    asyncio.run(run())


def test_a_cancel_reaches_the_server_that_runs_the_batch(stages: Stages, engine: Engine) -> None:
    """With its next answer, or when it looks."""

    async def run() -> None:
        first, second = stages(1), stages(1)
        engine.held = {"two"}
        batch_id = await first.begin(*LINES)
        await engine.has_held.wait()
        reply = await second.batches.cancel(batch_id, "me")
        assert (reply.status, reply.cancelled_at) == ("cancelling", None)
        engine.may_go_on.set()
        reply = await first.ended(batch_id)
        assert engine.asked == LINES[:2]
        assert (reply.status, first.said(reply.output_file_id)) == ("cancelled", LINES[:2])
        assert (reply.request_counts.completed, reply.request_counts.total) == (2, 4)

    asyncio.run(run())


def test_a_cancelled_batch_stays_cancelled_after_a_kill(stages: Stages, engine: Engine) -> None:
    async def run() -> None:
        first = stages(1)
        engine.held = {"two"}
        batch_id = await first.begin(*LINES)
        await engine.has_held.wait()
        await first.batches.cancel(batch_id, "me")
        await kill(first)
        second = stages(1)
        await second.batches.look_after()
        reply = await second.ended(batch_id)
        assert engine.asked == LINES[:2]
        assert (reply.status, second.said(reply.output_file_id)) == ("cancelled", LINES[:1])

    asyncio.run(run())


def test_a_batch_that_ends_its_servers_fails(
    stages: Stages, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a line that kills a process would kill every one after it. An answer is progress."""
    monkeypatch.setattr(batch_job, "MAX_STARTS", 2)

    async def run() -> None:
        stage = stages(1)
        engine.held = {"two"}
        batch_id = await stage.begin(*LINES)
        for _ in range(3):
            await engine.has_held.wait()
            assert (await stage.get(batch_id)).status == "in_progress"
            await kill(stage)
            engine.has_held.clear()
            stage = stages(1)
            await stage.batches.look_after()
        reply = await stage.ended(batch_id)
        assert engine.asked == ["one", "two", "two", "two"]
        assert reply.status == "failed"
        assert reply.errors is not None
        assert reply.errors.data[0].code == "no_progress"
        assert stage.said(reply.output_file_id) == ["one"]

    asyncio.run(run())


def test_a_batch_that_gets_on_may_have_many_servers(
    stages: Stages, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them answers a line before it ends."""
    monkeypatch.setattr(batch_job, "MAX_STARTS", 1)

    async def run() -> None:
        stage = stages(1)
        engine.held = {"two"}
        batch_id = await stage.begin(*LINES)
        for following in (["three"], ["four"], []):
            while stage.batches._jobs and not engine.has_held.is_set():
                await asyncio.sleep(0.001)
            await kill(stage)
            engine.has_held.clear()
            engine.held = set(following)
            stage = stages(1)
            await stage.batches.look_after()
        reply = await stage.ended(batch_id)
        assert (reply.status, stage.said(reply.output_file_id)) == ("completed", LINES)

    asyncio.run(run())


def full(*_: object, **__: object) -> Any:
    problem = sqlite3.OperationalError("database or disk is full")
    problem.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise problem


@pytest.mark.parametrize(
    ("owner", "name"),
    [(BatchTable, "add_answer"), (BatchTable, "change"), (FileStore, "show")],
)
def test_a_batch_waits_for_a_full_disk_and_loses_nothing(
    stages: Stages, engine: Engine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """The third attempt of each kind succeeds."""
    monkeypatch.setattr(batch_job, "STORAGE_SECONDS", 0)
    work, num_left = getattr(owner, name), 2

    def try_it(*arguments: Any, **options: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        return full() if num_left >= 0 else work(*arguments, **options)

    async def run() -> None:
        stage = stages(2)
        file_id = await stage.upload(*LINES)
        monkeypatch.setattr(owner, name, try_it)
        batch_id = await stage.begin_with(file_id)
        reply = await stage.ended(batch_id)
        assert num_left < 0
        assert (reply.status, stage.said(reply.output_file_id)) == ("completed", LINES)
        assert sorted(engine.asked) == sorted(LINES)
        names = {path.name for path in stage.files.folder.iterdir()}
        assert names == {file_id, reply.output_file_id}

    asyncio.run(run())


def test_a_server_may_be_stopped_while_its_disk_is_full(
    stages: Stages, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that could not be kept is asked for again."""
    monkeypatch.setattr(batch_job, "STORAGE_SECONDS", 0)

    async def run() -> None:
        stage = stages(1)
        batch_id = await stage.begin(*LINES)
        with monkeypatch.context() as patch:
            patch.setattr(BatchTable, "add_answer", full)
            while not engine.asked:
                await asyncio.sleep(0.01)
            stage.service.is_draining = True
            assert (await stage.ended(batch_id)).status == "in_progress"
        await stage.batches.close()
        again = stages(1)
        await again.batches.look_after()
        reply = await again.ended(batch_id)
        assert (reply.status, again.said(reply.output_file_id)) == ("completed", LINES)
        assert engine.asked == ["one", *LINES]

    asyncio.run(run())


def test_an_input_file_outlives_its_deletion_until_its_batch_ends(
    stages: Stages, engine: Engine
) -> None:
    """Unseen; whether its owner deletes it or it expires."""

    async def run() -> None:
        stage = stages(1)
        engine.held = {"two"}
        batch_id = await stage.begin(*LINES)
        await engine.has_held.wait()
        file_id = (await stage.get(batch_id)).input_file_id
        await stage.files.delete(file_id, "me")
        with pytest.raises(ApiError):
            await stage.files.get(file_id, "me")
        assert stage.files.path(file_id).exists()
        engine.may_go_on.set()
        reply = await stage.ended(batch_id)
        assert (reply.status, stage.said(reply.output_file_id)) == ("completed", LINES)
        await stage.batches.look_after()
        assert not stage.files.path(file_id).exists()

    asyncio.run(run())


def test_an_input_file_that_is_gone_fails_the_batch_which_keeps_its_answers(
    stages: Stages, engine: Engine
) -> None:
    async def run() -> None:
        stage = stages(1)
        engine.held = {"two"}
        batch_id = await stage.begin(*LINES)
        await engine.has_held.wait()
        stage.files.path((await stage.get(batch_id)).input_file_id).unlink()
        engine.may_go_on.set()
        reply = await stage.ended(batch_id)
        assert reply.status == "failed"
        assert reply.errors is not None
        assert reply.errors.data[0].code == "input_file_gone"
        assert stage.said(reply.output_file_id) == LINES[:2]

    asyncio.run(run())


def test_output_files_expire_if_asked(stages: Stages, engine: Engine) -> None:
    async def run() -> None:
        stage = stages(1)
        expiry = {"anchor": "created_at", "seconds": HOUR}
        reply = await stage.ended(await stage.begin("one", output_expires_after=expiry))
        output = await stage.files.get(reply.output_file_id or "", "me")
        assert output.expires_at == output.created_at + HOUR

    asyncio.run(run())


def test_a_full_disk_is_told_once_until_it_changes(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by the database, which each look asks; with its place for a fault of ours only."""
    monkeypatch.setattr(batches, "LOOK_SECONDS", 0)
    ours = ZeroDivisionError("ours")
    looks: list[Any] = [full, full, full, None, full, OSError("gone"), OSError("gone"), ours, ours]

    async def run() -> None:
        stage = stages(1)

        async def look() -> None:
            if not looks:
                raise asyncio.CancelledError
            found = looks.pop(0)
            if isinstance(found, Exception):
                raise found
            await stage.store.database.run(found or (lambda connection: None))

        monkeypatch.setattr(stage.batches, "look_after", look)
        with pytest.raises(asyncio.CancelledError):
            await stage.batches._keep_looking()

    asyncio.run(run())
    told = [(record.getMessage().rpartition(": ")[2], record.exc_info) for record in caplog.records]
    disk = [
        ("database or disk is full", None),
        ("the server's disk is full; what was stored before is kept", None),
    ]
    assert told[:5] == [*disk, *disk, ("gone", None)]
    assert told[5][0] == "ours"
    assert told[5][1] is not None
    assert len(told) == 6
