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

    def __init__(self, tokenizer: Tokenizer, concurrency: int) -> None:
        settings = ServerSettings(batch_concurrency=concurrency)
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

    def full(custom_id: str, status: int, body: str) -> bytes:
        if custom_id == "bad":
            raise OSError("no space left")
        return record(custom_id, status, body)

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
