"""Stored items cost no more than what a request could send itself, however often it names them.

A request of 5 kB took 2 GB and five seconds of everybody's time, since it named one item of 4 MB a
hundred times. Oracle: the limits, counted by hand, and the texts of the prompts.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live
from openai import BadRequestError, OpenAI

from rorqual.serve import response_input
from rorqual.serve.response_input import Record
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


@pytest.mark.parametrize("end", ["", "/input_items?limit=1"])
def test_what_is_read_again_is_paced_and_built_aside(
    live: Live, client: OpenAI, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """As much is read for one item as for all: what the client's bodies cost, it costs."""
    first = ask(client, "hello")
    service = live.app.state.service
    threads: list[str] = []
    paced: list[tuple[str, bytes]] = []
    read, turn = Record.read, service.pacer.turn

    def note(stored: Any) -> Record:
        threads.append(threading.current_thread().name)
        return read(stored)

    async def note_turn(owner: str, content: bytes) -> None:
        paced.append((owner, content))
        await turn(owner, content)

    monkeypatch.setattr(Record, "read", note)
    monkeypatch.setattr(service.pacer, "turn", note_turn)
    reply = web.get(f"{live.url}/v1/responses/{first.id}{end}")
    assert reply.status_code == 200
    assert [name.rpartition("_")[0] for name in threads] == ["rorqual-texts"]
    [(owner, content)] = paced
    assert owner == "address 127.0.0.1"
    assert json.loads(content)["response"]["id"] == first.id


def test_who_reads_many_has_a_share_of_the_places(live: Live, client: OpenAI) -> None:
    """Reading again counts as a request does; a list of models does not."""
    first = ask(client, "hello")
    service = live.app.state.service
    most = service.settings.max_concurrent_requests
    service.note_in_flight(most, "address 127.0.0.1")
    try:
        for end in ("", "/input_items"):
            reply = web.get(f"{live.url}/v1/responses/{first.id}{end}")
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        assert web.get(f"{live.url}/v1/models").status_code == 200
    finally:
        service.note_in_flight(-most, "address 127.0.0.1")
    assert web.get(f"{live.url}/v1/responses/{first.id}").status_code == 200
