"""What `/v1/responses` and `/v1/messages` say when an answer does not come to its end.

Oracle: the exception that the fake engine is given, and the shapes that the official clients read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from openai import OpenAI
from served import SCRIPT, make_model

from patience import HANG_SECONDS, wait_until
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.serve.store import StorageError
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

KEY = "first-key-0001"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "count up"},
    MESSAGES: {"max_tokens": 500, "messages": [{"role": "user", "content": "count up"}]},
}


@contextmanager
def held(tokenizer: Tokenizer, after: int, **settings: Any) -> Iterator[tuple[Live, FakeEngine]]:
    """A server whose answers stop after so many pieces, until they are let go on."""
    engine = FakeEngine(tokenizer, SCRIPT, hold_after=after)
    wanted = ServerSettings(**{"keep_alive_seconds": 0.02} | settings)
    with running(create_app(engine, make_model(tokenizer), wanted)) as live:
        yield live, engine


def let_fail(live: Live, engine: FakeEngine) -> None:
    def act() -> None:
        engine.problem = RuntimeError("the device is gone")
        engine.gate.set()

    live.loop.call_soon_threadsafe(act)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of a stream's events, without comments."""
    events = []
    for part in text.strip().split("\n\n"):
        lines = part.split("\n")
        if lines[0].startswith("event: "):
            assert lines[1].startswith("data: ")
            events.append((lines[0][7:], json.loads(lines[1][6:])))
    assert all(name == data["type"] for name, data in events)
    return events


@pytest.mark.parametrize("after", [0, 3], ids=["before", "within"])
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_stream_that_fails_says_so_in_its_own_way(
    tokenizer: Tokenizer, path: str, after: int
) -> None:
    with held(tokenizer, after) as (live, engine):
        body = BODIES[path] | {"stream": True}
        with web.stream("POST", live.url + path, json=body) as response:
            parts = response.iter_text()
            text = next(parts)
            wait_until(lambda: engine.is_held)
            let_fail(live, engine)
            text += "".join(parts)
        events = events_of(text)
        name, data = events[-1]
        if path == MESSAGES:
            assert name == "error"
            assert data["error"]["type"] == "api_error"
            if not after:  # what came first are signs of life
                assert {kind for kind, _ in events[:-1]} == {"ping"}
        else:
            assert name == "response.failed"
            assert data["response"]["error"]["code"] == "server_error"
            assert [item["sequence_number"] for _, item in events] == list(range(len(events)))
            assert [kind for kind, _ in events[:2]] == ["response.created", "response.in_progress"]
            stored = web.get(f"{live.url}{path}/{data['response']['id']}")
            assert stored.status_code == 404
        assert "[DONE]" not in text
        assert "the device is gone" not in text


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_whole_reply_that_fails(tokenizer: Tokenizer, path: str) -> None:
    """With its own status, or after signs of life in the body."""
    with (
        held(tokenizer, 0) as (live, engine),
        web.stream("POST", live.url + path, json=BODIES[path]) as response,
    ):
        parts = response.iter_text()
        assert next(parts).strip() == ""
        let_fail(live, engine)
        late = json.loads("".join(parts))
    with held(tokenizer, 10**6, keep_alive_seconds=HANG_SECONDS) as (live, engine):
        engine.problem = RuntimeError("the device is gone")
        early = web.post(live.url + path, json=BODIES[path])
        assert early.status_code == 500
    if path == MESSAGES:
        assert (late["type"], late["error"]["type"]) == ("error", "api_error")
        assert early.json()["error"]["type"] == "api_error"
        assert early.headers["request-id"] == early.json()["request_id"]
    else:
        assert (late["status"], late["error"]["code"]) == ("failed", "server_error")
        assert early.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_client_that_leaves_frees_its_answer(tokenizer: Tokenizer, path: str) -> None:
    with held(tokenizer, 2) as (live, engine):
        body = BODIES[path] | {"stream": True}
        with web.stream("POST", live.url + path, json=body) as response:
            next(response.iter_text())
            wait_until(lambda: engine.is_held)
        wait_until(lambda: engine.num_cancelled == 1)
        assert engine.num_open == 0


def test_the_store_may_be_full(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the answer is there and cannot be kept: an error, before its last event."""
    with held(tokenizer, 10**6) as (live, _):

        async def put(response: Any) -> None:
            raise StorageError(507, "the disk is full", code="storage_failed")

        monkeypatch.setattr(live.app.state.store.responses, "put", put)
        url = live.url + RESPONSES
        whole = web.post(url, json={"input": "hello"})
        assert (whole.status_code, whole.json()["error"]["code"]) == (507, "storage_failed")
        events = events_of(web.post(url, json={"input": "hello", "stream": True}).text)
        assert events[-1][0] == "response.failed"
        assert events[-1][1]["response"]["error"]["message"] == "the disk is full"
        assert web.post(url, json={"input": "hello", "store": False}).status_code == 200


def test_keys(tokenizer: Tokenizer) -> None:
    with held(tokenizer, 10**6, api_keys=(KEY,)) as (live, _):
        url, body = live.url + MESSAGES, BODIES[MESSAGES]
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            version = {"anthropic-version": "2023-06-01", "anthropic-beta": "x-2025-01-01"}
            assert web.post(url, json=body, headers=headers | version).status_code == 200
        wrong = web.post(url, json=body, headers={"x-api-key": "sk-none"})
        assert wrong.status_code == 401
        assert wrong.json()["error"]["type"] == "authentication_error"
        assert wrong.json()["request_id"] == wrong.headers["request-id"]
        assert web.post(live.url + RESPONSES, json=BODIES[RESPONSES]).status_code == 401
        client = OpenAI(base_url=live.url + "/v1", api_key=KEY, timeout=HANG_SECONDS)
        assert client.responses.create(model="sei", input="hello").status == "completed"


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 5, 8, 50])
def test_several_tokens_of_a_step_have_their_logprobs(
    tokenizer: Tokenizer, step_tokens: int
) -> None:
    """Also where one piece has the end of the reasoning and the answer's beginning."""
    engine = FakeEngine(tokenizer, SCRIPT, step_tokens=step_tokens)
    with running(create_app(engine, make_model(tokenizer))) as live:
        client = OpenAI(base_url=live.url + "/v1", api_key="none")
        include: Any = ["message.output_text.logprobs"]
        reply = client.responses.create(model="sei", input="think first", include=include)
    part: Any = reply.output[1]
    entries = part.content[0].logprobs
    assert "".join(entry.token for entry in entries) == "It is deep."
