"""How a batch's workers end: one that fails ends the others, a cancel ends those that wait.

Oracle: the requests that reach a stand-in for the engine, which a test fails, holds and lets go.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from served import make_model

from rorqual.engine import EngineFailed, EngineOverloaded
from rorqual.serve import batches
from rorqual.serve.batches import Batches
from rorqual.serve.errors import ApiError
from rorqual.serve.files import FileStore
from rorqual.serve.schemas_batches import BatchReply, BatchRequest
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
ANSWER = '{"said": "yes"}'
Answer = Callable[[str], Awaitable[str]]
"""From a line's question to its answer's JSON."""


class Stage:
    """Batches of a server of which `answer` is all the rest."""

    def __init__(
        self, tokenizer: Tokenizer, concurrency: int, settings: ServerSettings | None = None
    ) -> None:
        settings = settings or ServerSettings(batch_concurrency=concurrency)
        self.files = FileStore(settings)
        service = Service(FakeEngine(tokenizer), make_model(tokenizer), settings)
        self.batches = Batches(service, self.files)

    async def begin(self, *questions: str) -> BatchReply:
        body = b"\n".join(_line(question) for question in questions)
        file = await self.files.add([body], len(body), "in.jsonl", "me")
        request = BatchRequest(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata=None
        )
        batch = await self.batches.create(request, "me")
        return self.batches.get(batch.id, "me")

    def said(self, file_id: str | None) -> list[str]:
        assert file_id is not None
        return [json.loads(line)["custom_id"] for line in self.files.lines(file_id, "me")]


def _line(question: str) -> bytes:
    body = {"messages": [{"role": "user", "content": question}]}
    line = {"custom_id": question, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(line).encode()


@pytest.fixture
def stages(tokenizer: Tokenizer) -> Iterator[Callable[[int], Stage]]:
    made: list[Stage] = []

    def make(concurrency: int) -> Stage:
        made.append(Stage(tokenizer, concurrency))
        return made[-1]

    yield make
    for stage in made:
        stage.files.close()


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    def use(answer: Answer) -> None:
        async def work(service: Service, body: Any) -> str:
            return await answer(body.messages[0].content)

        monkeypatch.setitem(batches.ROUTES, CHAT, (ChatRequest, work))  # type: ignore[arg-type]

    return use


def test_a_worker_that_fails_ends_the_others_before_the_files_close(
    stages: Callable[[int], Stage],
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full for one line: the other's answer never comes, and what was written stays."""
    ended: list[str] = []
    record = batches._record

    def full(custom_id: str, *rest: Any) -> bytes:
        if custom_id == "bad":
            raise OSError("no space left")
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
        monkeypatch.setattr(batches, "_record", full)
        reply = await stage.begin("good", "held", "bad", "never")
        await stage.batches.drain()
        assert ended == ["held"]
        assert reply.status == "failed"
        assert reply.errors is not None
        assert stage.said(reply.output_file_id) == ["good"]
        assert len(asyncio.all_tasks()) == 1
        assert not list(stage.files.folder.glob("*.part"))

    asyncio.run(run())


def test_an_engine_that_failed_fails_the_batch(
    stages: Callable[[int], Stage], answering: Callable[[Answer], None]
) -> None:
    """Its lines were not answered, so the batch is not completed; the answers before stay."""

    async def run() -> None:
        stage = stages(1)

        async def answer(question: str) -> str:
            if question == "good":
                return ANSWER
            raise EngineFailed("the engine has failed", fix="start it again")

        answering(answer)
        reply = await stage.begin("good", "bad", "never")
        await stage.batches.drain()
        assert reply.status == "failed"
        assert reply.errors is not None
        assert reply.errors.data[0].code == "engine_failed"
        assert stage.said(reply.output_file_id) == ["good"]
        assert (reply.request_counts.completed, reply.request_counts.failed) == (1, 0)

    asyncio.run(run())


def test_a_line_that_waits_for_the_queue_does_not_begin_after_a_cancel(
    stages: Callable[[int], Stage],
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cancel comes while the worker waits to ask again."""
    monkeypatch.setattr(batches, "FULL_QUEUE_SECONDS", 0)
    asked: list[str] = []

    async def run() -> None:
        stage = stages(1)

        async def answer(question: str) -> str:
            asked.append(question)
            if len(asked) == 1:
                loop = asyncio.get_running_loop()
                loop.call_soon(lambda: stage.batches.cancel(reply.id, "me"))
                raise EngineOverloaded("too many answers are open")
            return ANSWER

        answering(answer)
        reply = await stage.begin("one", "two")
        await stage.batches.drain()
        assert asked == ["one"]
        assert reply.status == "cancelled"
        assert (reply.request_counts.completed, reply.request_counts.failed) == (0, 0)

    asyncio.run(run())


def test_a_line_that_waits_for_room_does_not_begin_after_a_cancel(
    stages: Callable[[int], Stage], answering: Callable[[Answer], None]
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
        while not stage.batches._room._waiters:
            await asyncio.sleep(0)
        stage.batches.cancel(second.id, "me")
        may_go_on.set()
        await stage.batches.drain()
        assert asked == ["first"]
        assert (first.status, second.status) == ("completed", "cancelled")

    asyncio.run(run())


def test_an_answer_that_takes_too_long_is_its_lines_failure(
    tokenizer: Tokenizer, answering: Callable[[Answer], None]
) -> None:
    """The lines behind it are answered; each moment of the batch has its time."""

    async def run() -> None:
        settings = ServerSettings(batch_concurrency=1, request_timeout_seconds=1e-3)
        stage = Stage(tokenizer, 1, settings)

        async def answer(question: str) -> str:
            if question == "slow":
                await asyncio.Event().wait()
            return ANSWER

        answering(answer)
        reply = await stage.begin("slow", "quick")
        await stage.batches.drain()
        assert reply.status == "completed"
        counts = reply.request_counts
        assert (counts.total, counts.completed, counts.failed) == (2, 1, 1)
        assert stage.said(reply.output_file_id) == ["quick"]
        [record] = map(json.loads, stage.files.lines(reply.error_file_id or "", "me"))
        assert record["custom_id"] == "slow"
        assert record["response"]["status_code"] == 504
        times = (reply.in_progress_at, reply.finalizing_at, reply.completed_at)
        assert None not in times
        assert (reply.failed_at, reply.cancelling_at, reply.cancelled_at) == (None, None, None)
        assert stage.batches.cancel(reply.id, "me").status == "completed"
        stage.files.close()

    asyncio.run(run())


def test_a_batch_without_failures_has_no_file_of_them(
    stages: Callable[[int], Stage], answering: Callable[[Answer], None]
) -> None:
    async def run() -> None:
        stage = stages(2)

        async def answer(question: str) -> str:
            return ANSWER

        answering(answer)
        first = await stage.begin("one")
        second = await stage.begin("two", "three")
        await stage.batches.drain()
        assert first.error_file_id is None
        assert [reply.id for reply in stage.batches.all_of("me")] == [second.id, first.id]
        assert stage.batches.all_of("other") == []
        assert second.request_counts.completed == 2

    asyncio.run(run())


def test_so_many_batches_run_and_the_oldest_that_ended_goes(
    stages: Callable[[int], Stage],
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
        assert [reply.id for reply in stage.batches.all_of("me")] == [third.id, second.id]
        with pytest.raises(ApiError):
            stage.batches.get(first.id, "me")
        await stage.batches.drain()

    asyncio.run(run())


@pytest.mark.parametrize("excess", [0, 1])
def test_a_line_may_be_as_long_as_a_body(excess: int) -> None:
    raw, seen = _line("q"), set[str]()
    fault = batches._fault_of(raw, CHAT, seen, len(raw) - excess)
    assert (fault and fault.code) == ("line_too_long" if excess else None)
    assert seen == (set() if excess else {"q"})
    if not excess:
        again = batches._fault_of(raw, CHAT, seen, len(raw))
        assert again is not None
        assert again.code == "duplicate_custom_id"
