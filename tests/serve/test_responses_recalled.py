"""Stored items cost no more than what a request could send itself, however often it names them.

A request of 5 kB took 2 GB and five seconds of everybody's time, since it named one item of 4 MB a
hundred times. Oracle: the limits, counted by hand, and the texts of the prompts.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from openai import BadRequestError, OpenAI

from rorqual.serve import response_input
from rorqual.serve.store import ResponseStore
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

TEXT = "whale " * 10
TURN: dict[str, Any] = {"role": "user", "content": TEXT}


def ask(client: OpenAI, given: Any, **fields: Any) -> Any:
    return client.responses.create(model="sei", input=given, **fields)


def refused(client: OpenAI, given: Any, **fields: Any) -> str:
    """The field at fault."""
    with pytest.raises(BadRequestError) as caught:
        ask(client, given, **fields)
    assert caught.value.code == "context_length_exceeded"
    return str(caught.value.param)


def reference(client: OpenAI) -> dict[str, str]:
    first = ask(client, [TURN])
    (item,) = client.responses.input_items.list(first.id).data
    assert item.id is not None
    return {"type": "item_reference", "id": item.id}


def test_an_item_named_again_and_again(
    client: OpenAI, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = reference(client)
    whole = response_input.num_chars({"type": "message", "role": "user", "id": named["id"]})
    parts = response_input.num_chars({"content": [{"type": "input_text", "text": TEXT}]})
    monkeypatch.setattr(response_input, "MAX_STORED_CHARS", 3 * (whole + parts))
    ask(client, [named, named, named])
    prompt = tokenizer.decode(engine.requests[-1].prompt_ids)
    assert prompt.count(TEXT.strip()) == 3
    assert refused(client, [named, TURN, named, named, named]) == "input[4].id"


def test_a_response_is_read_once_for_all_its_items(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = reference(client)
    read: list[str] = []
    get = ResponseStore.get

    async def counted(store: ResponseStore, response_id: str, owner: str) -> Any:
        read.append(response_id)
        return await get(store, response_id, owner)

    monkeypatch.setattr(ResponseStore, "get", counted)
    ask(client, [named] * 20)
    assert len(read) == 1
    monkeypatch.setattr(response_input, "MAX_CHAIN_BYTES", 100)
    assert refused(client, [TURN, named]) == "input[1].id"


def test_a_conversation_that_grows(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_input, "MAX_ITEMS", 4)
    first = ask(client, [TURN])
    second = ask(client, [TURN], previous_response_id=first.id)
    third = ask(client, [TURN], previous_response_id=second.id)  # goes on with two turns
    assert refused(client, "hello", previous_response_id=third.id) == "previous_response_id"
    ask(client, "hello", previous_response_id=second.id)
