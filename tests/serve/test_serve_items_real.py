"""`/v1/responses` and `/v1/messages` over the real engine, whose grammars bind what it writes.

Oracle: the chat route with the same seed or none, and the schemas that were asked for. A random
model writes anything, so a call in the wanted form was made by its grammar; the shipped one writes
the same to everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import web
from live import Live, running
from openai import OpenAI
from real import make_engine, serve_engine

from patience import HANG_SECONDS
from rorqual.engine import Engine
from rorqual.serve.app import create_app
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN

pytestmark = pytest.mark.concurrency

SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"],
          "additionalProperties": False}  # fmt: skip
QUESTION = "What is 12 + 30?"


@pytest.fixture(scope="module")
def random_one(tokenizer: Tokenizer) -> Iterator[Live]:
    with running(create_app(*serve_engine(make_engine(tokenizer)))) as live:
        yield live


@pytest.fixture(scope="module")
def shipped() -> Iterator[Live]:
    with running(create_app(*serve_engine(Engine("tiny")))) as live:
        yield live


def openai(live: Live) -> OpenAI:
    return OpenAI(base_url=live.url + "/v1", api_key="none", timeout=HANG_SECONDS)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_forced_calls_follow_their_schema(
    random_one: Live, tokenizer: Tokenizer, is_stream: bool
) -> None:
    bias = {str(tokenizer.special_ids[THINK_BEGIN]): -100}
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA}
    body: dict[str, Any] = {"input": "x", "tools": [tool], "tool_choice": "required"}
    body |= {"temperature": 1, "seed": 4, "max_output_tokens": 200, "logit_bias": bias}
    body |= {"parallel_tool_calls": False, "stream": is_stream}
    text = web.post(random_one.url + "/v1/responses", json=body).text
    if is_stream:
        text = json.dumps(json.loads(text.strip().rpartition("data: ")[2])["response"])
    response = json.loads(text)
    assert response["status"] == "completed", text
    (call,) = response["output"]
    assert set(json.loads(call["arguments"])) == {"hot"}


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_forced_tool_use_follows_its_schema(random_one: Live, is_stream: bool) -> None:
    body: dict[str, Any] = {
        "max_tokens": 400,
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "weather"},
        "temperature": 0,
        "stream": is_stream,
    }
    text = web.post(random_one.url + "/v1/messages", json=body).text
    if is_stream:
        lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        deltas = [event["delta"] for event in lines if event["type"] == "content_block_delta"]
        parts = [delta["partial_json"] for delta in deltas if "partial_json" in delta]
        said = json.loads("".join(parts))
        assert len(parts) > 1, "what a grammar holds to JSON comes as it is written"
    else:
        said = json.loads(text)["content"][-1]["input"]
    assert set(said) == {"hot"}


def test_the_shipped_model_says_the_same_on_every_route(shipped: Live) -> None:
    client = openai(shipped)
    chat = client.chat.completions.create(
        model="sei", messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    said, usage = chat.choices[0].message.content, chat.usage
    assert usage is not None
    response = client.responses.create(model="sei", input=QUESTION, temperature=0)
    assert response.output_text == said
    assert response.usage is not None
    assert response.usage.input_tokens == usage.prompt_tokens
    assert response.usage.output_tokens == usage.completion_tokens
    with client.responses.stream(model="sei", input=QUESTION, temperature=0) as stream:
        assert stream.get_final_response().output_text == said
    body: dict[str, Any] = {"max_tokens": 4096, "temperature": 0}
    body["messages"] = [{"role": "user", "content": QUESTION}]
    message = web.post(shipped.url + "/v1/messages", json=body).json()
    assert "".join(block["text"] for block in message["content"]) == said
    count = web.post(shipped.url + "/v1/messages/count_tokens", json={"messages": body["messages"]})
    assert count.json()["input_tokens"] == usage.prompt_tokens
    follow = client.responses.create(
        model="sei", input="And what is 3 + 4?", previous_response_id=response.id, temperature=0
    )
    turns: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And what is 3 + 4?"},
    ]
    whole = client.chat.completions.create(model="sei", messages=turns, temperature=0)
    assert follow.output_text == whole.choices[0].message.content
    assert follow.usage is not None
    assert follow.usage.input_tokens_details.cached_tokens > 0
