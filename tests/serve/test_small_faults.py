"""What a stranger met: faults told by what was sent, and small things as OpenAI's service has them.

Oracles: the official clients, and the documented ranges.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live
from openai import OpenAI

from rorqual.engine import (
    AsyncEngine,
    ClientOverloaded,
    Engine,
    EngineOverloaded,
    Request,
    SamplingParams,
)
from rorqual.serve.errors import ApiError
from rorqual.serve.service import Service
from rorqual.serve.settings import ServedModel, ServerSettings

pytestmark = pytest.mark.concurrency

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PAIRS = {f"n{number}": "v" for number in range(17)}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (RESPONSES, {"input": []}, 422, "input: it has no items"),
        (RESPONSES, {}, 422, "missing field 'input'"),
        (TEXT, {"prompt": None}, 422, "missing field 'prompt'"),
        (CHAT, {"messages": HELLO, "thinking": "x"}, 422, "true, false, or an object"),
        (CHAT, {"messages": HELLO, "thinking": 3}, 422, "true, false, or an object"),
        (CHAT, {"messages": HELLO, "max_tokens": -2}, 422, "-1"),
        (TEXT, {"prompt": "x", "max_tokens": -2}, 422, "-1"),
        (RESPONSES + "/compact", {"input": "x"}, 501, "use truncation"),
        (CHAT, {"messages": HELLO, "model": "x"}, 404, "there is 'sei' and 'minke'"),
        (RESPONSES, {"input": "x", "max_output_tokens": -1}, 422, "max_output_tokens"),
        (RESPONSES, {"input": "x", "metadata": PAIRS}, 422, "metadata"),
        (RESPONSES, {"input": "x", "metadata": {"a" * 65: "b"}}, 422, "metadata"),
        (RESPONSES, {"input": "x", "metadata": {"a": "b" * 513}}, 422, "metadata"),
        (RESPONSES, {"input": "x", "metadata": {"a": 1}}, 422, "metadata"),
    ],
)
def test_a_fault_is_told_by_what_was_sent(
    live: Live, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    reply = web.post(live.url + path, json=body)
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]["message"]


def test_a_response_tells_the_tool_choice_that_openai_has(client: OpenAI) -> None:
    response = client.responses.create(model="sei", input="hello", max_output_tokens=4)
    assert response.tool_choice == "auto"
    assert (response.metadata, response.max_output_tokens) == ({}, 4)


def test_an_empty_suffix_is_none(live: Live, engine: FakeEngine) -> None:
    prompts = []
    for more in ({}, {"suffix": ""}, {"suffix": "", "echo": True}):
        reply = web.post(live.url + TEXT, json={"prompt": "x", "max_tokens": 2} | more)
        assert reply.status_code == 200, reply.text
        prompts.append(engine.requests[-1].prompt_ids)
    assert prompts == prompts[:1] * 3


def test_a_file_comes_back_as_bytes_of_no_kind(client: OpenAI) -> None:
    file = client.files.create(file=("u.txt", b"whale"), purpose="user_data")
    reply = client.files.content(file.id)
    assert reply.content == b"whale"
    assert reply.response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("base", ["", "/anthropic"])
def test_anthropics_client_lists_the_models(live: Live, base: str) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic client is missing")
    claude = anthropic.Anthropic(base_url=live.url + base, api_key="none", max_retries=0)
    listed = list(claude.models.list())
    assert [(card.id, card.type) for card in listed] == [("sei", "model"), ("minke", "model")]
    assert claude.models.retrieve("minke").display_name == "minke"
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.models.retrieve("nobody")
    assert caught.value.body["type"] == "error"
    assert caught.value.body["request_id"] == caught.value.request_id


def test_faults_under_anthropics_address_have_its_shape(live: Live) -> None:
    for path, status in (("/anthropic/nowhere", 404), ("/anthropic/v1/models", 405)):
        method = "GET" if status == 404 else "DELETE"
        reply = web.request(method, live.url + path)
        assert (reply.status_code, reply.json()["type"]) == (status, "error")
    assert "type" not in web.get(live.url + "/v1/models/nobody").json()


def test_the_description_and_the_table_of_errors_have_405_and_501(live: Live) -> None:
    described = web.get(live.url + "/openapi.json").json()
    assert "Anthropic" in described["info"]["description"]
    replies = described["paths"][CHAT]["post"]["responses"]
    assert {"405", "501"} <= set(replies)


def test_more_answers_than_there_is_ever_room_for_are_refused_for_good(
    model: ServedModel, tokenizer: Any
) -> None:
    engine = FakeEngine(tokenizer, max_open=4)
    service = Service(engine, model, ServerSettings())
    request = Request([1, 2], SamplingParams())
    service.answers([request] * 4)
    with pytest.raises(ApiError) as caught:
        service.answers([request] * 5)
    assert (caught.value.status, caught.value.param) == (422, "n")
    assert "at most 4" in caught.value.message
    service.close()
    assert "your share" in told(service, ClientOverloaded("too many requests of one client"))


def told(service: Service, problem: Exception) -> str:
    error = service.api_error(problem)
    assert error is not None
    assert (error.status, error.code) == (429, "queue_full")
    return error.message


@pytest.mark.parametrize("is_background", [False, True])
@pytest.mark.parametrize(("max_batch", "max_queue"), [(1, 0), (2, 2), (3, 4), (8, 256)])
def test_the_most_at_once_is_what_a_lone_client_is_given(
    max_batch: int, max_queue: int, is_background: bool
) -> None:
    """Oracle: asking for one after the other until one is refused."""
    for owner in ("me", ""):
        engine = AsyncEngine(Engine("tiny", max_batch=max_batch), max_queue=max_queue)
        request = Request([1, 2], SamplingParams(), owner, is_background and bool(owner))
        count = asyncio.run(_fill(engine, request))
        assert engine.most_at_once(request) == count


async def _fill(engine: AsyncEngine, request: Request) -> int:
    async with engine_of(engine):
        streams = []
        with suppress(EngineOverloaded):
            while True:
                streams.append(engine.submit(request))
        for stream in streams:
            await stream.aclose()
        return len(streams)


@asynccontextmanager
async def engine_of(engine: AsyncEngine) -> AsyncIterator[None]:
    await engine.start()
    try:
        yield
    finally:
        await engine.close()


def test_a_tool_fits_the_bundled_model() -> None:
    """The example of docs/api.md, with room for its answer."""
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith('tool = {"type"'))
    tool = ast.literal_eval(line.removeprefix("tool = "))
    model = Engine("tiny")
    prompt = model.tokenizer.encode_chat(
        [{"role": "user", "content": "The weather in Oslo?"}], [tool], True, None
    )
    assert "The weather in Oslo?" in text
    assert len(prompt) + 60 <= 256
