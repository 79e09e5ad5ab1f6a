"""Servers' batches without the servers: a test answers the lines, and moves the clock."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from served import make_model
from stored import Clock

from rorqual.serve import batch_job
from rorqual.serve.batches import Batches
from rorqual.serve.fair_pool import Caller
from rorqual.serve.schemas_batches import BatchReply, BatchRequest
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.serve.store import NewFile, Store
from rorqual.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
ANSWER = '{"said": "yes"}'
Answer = Callable[[str], Awaitable[str]]
"""From a line's question to its answer's JSON."""


class Stage:
    """Batches of a server of which `answer` is all the rest."""

    def __init__(self, tokenizer: Tokenizer, settings: ServerSettings, clock: Clock, name: str):
        self.store = Store(settings, clock)
        self.files = self.store.files
        self.service = Service(FakeEngine(tokenizer), make_model(tokenizer, name=name), settings)
        self.batches = Batches(self.service, self.store)

    async def upload(self, *questions: str, owner: str = "me") -> str:
        body = b"\n".join(line_of(question) for question in questions)
        return (await self.files.add([body], len(body), NewFile(name="in.jsonl", owner=owner))).id

    async def begin(self, *questions: str, owner: str = "me", **fields: Any) -> str:
        file_id = await self.upload(*questions, owner=owner)
        return await self.begin_with(file_id, owner, **fields)

    async def begin_with(self, file_id: str, owner: str = "me", **fields: Any) -> str:
        request = BatchRequest(input_file_id=file_id, endpoint=CHAT, **fields)
        return (await self.batches.create(request, owner)).id

    async def get(self, batch_id: str) -> BatchReply:
        return await self.batches.get(batch_id, "me")

    async def ended(self, batch_id: str) -> BatchReply:
        """The batch when nothing runs any more."""
        await self.batches.drain()
        return await self.get(batch_id)

    def said(self, file_id: str | None) -> list[str]:
        return [record["custom_id"] for record in self.records(file_id)]

    def records(self, file_id: str | None) -> list[Any]:
        assert file_id is not None
        return [json.loads(line) for line in self.files.path(file_id).read_bytes().splitlines()]

    def die(self) -> None:
        """What other servers see of a kill: its lock is free. Its work is left as it is."""
        self.store.presence.close()


Stages = Callable[..., Stage]


def line_of(question: str) -> bytes:
    body = {"messages": [{"role": "user", "content": question}]}
    line = {"custom_id": question, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(line).encode()


@pytest.fixture
def stages(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Stages]:
    """Servers on one folder, with one clock."""
    made: list[Stage] = []
    clock = Clock()

    def make(concurrency: int, *, name: str = "sei", **settings: Any) -> Stage:
        chosen = ServerSettings(
            batch_concurrency=concurrency, state_dir=tmp_path / "state", **settings
        )
        made.append(Stage(tokenizer, chosen, clock, name))
        return made[-1]

    yield make
    for stage in made:
        stage.store.close()


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Makes a function answer the lines of all servers."""

    def use(answer: Answer) -> None:
        async def work(service: Service, body: Any, caller: Caller) -> str:
            return await answer(body.messages[0].content)

        monkeypatch.setitem(batch_job.ROUTES, CHAT, (ChatRequest, work))  # type: ignore[arg-type]

    return use
