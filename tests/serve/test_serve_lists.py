"""Lists of files and batches, and how they end, through the official client.

Oracle: what the client itself documents of pages, expiry and metadata.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from openai import OpenAI
from served import SCRIPT, make_model
from stored import DAY, HOUR, Clock
from test_serve_batches import CHAT, chat_line, line, records, run, upload

from patience import wait_until
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lists_live(tokenizer: Tokenizer, clock: Clock) -> Iterator[Live]:
    app = create_app(FakeEngine(tokenizer, SCRIPT), make_model(tokenizer), clock=clock)
    with running(app) as live:
        yield live


@pytest.fixture
def lists_client(lists_live: Live) -> OpenAI:
    return OpenAI(base_url=lists_live.url + "/v1", api_key="none", max_retries=0)


def send(client: OpenAI, purpose: Any = "batch", **fields: Any) -> Any:
    content = io.BytesIO(chat_line("a", max_tokens=2).encode())
    return client.files.create(file=("in.jsonl", content), purpose=purpose, **fields)


def test_pages_of_files(lists_client: OpenAI) -> None:
    purposes = ["batch", "user_data", "evals", "batch", "user_data"]
    ids = [send(lists_client, purpose).id for purpose in purposes]
    files = lists_client.files
    for limit in (1, 2, 4, 5, 6):
        for order, expected in (("desc", ids[::-1]), ("asc", ids)):
            found = islice(files.list(limit=limit, order=order), 9)  # pages may have no end
            assert [file.id for file in found] == expected
    page = files.list(limit=2)
    assert [page.has_more, page.first_id, page.last_id] == [True, ids[4], ids[3]]  # type: ignore[attr-defined]
    assert [file.id for file in files.list(purpose="user_data", limit=1)] == [ids[4], ids[1]]
    assert [file.id for file in files.list(after=ids[2])] == [ids[1], ids[0]]
    for file in files.list(limit=2):  # each page begins behind one that is gone
        files.delete(file.id)
    page = files.list()
    assert (page.data, page.has_more, page.first_id) == ([], False, None)  # type: ignore[attr-defined]


def test_pages_of_batches(lists_client: OpenAI) -> None:
    file_id = send(lists_client).id
    ids = [run(lists_client, file_id).id for _ in range(3)]
    batches = lists_client.batches
    for limit in (1, 2, 3):
        assert [batch.id for batch in batches.list(limit=limit)] == ids[::-1]
    assert [batch.id for batch in batches.list(after=ids[1])] == [ids[0]]
    ordered = batches.list(extra_query={"order": "asc"}, limit=2)
    assert [batch.id for batch in ordered.data] == ids[:2]
    assert ordered.has_more


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("files?limit=0", "limit"),
        ("files?limit=10001", "limit"),
        ("files?limit=x", "limit"),
        ("files?order=up", "order"),
        ("batches?limit=101", "limit"),
        ("batches?limit=0", "limit"),
        ("batches?order=up", "order"),
    ],
)
def test_what_is_no_page_is_refused(lists_live: Live, path: str, param: str) -> None:
    refused = web.get(f"{lists_live.url}/v1/{path}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)


def test_files_expire(lists_client: OpenAI, clock: Clock) -> None:
    file = send(lists_client, expires_after={"anchor": "created_at", "seconds": HOUR})
    kept = send(lists_client)
    assert (file.expires_at, kept.expires_at) == (file.created_at + HOUR, None)
    assert file.created_at == int(clock())
    clock.advance(HOUR)
    assert [each.id for each in lists_client.files.list()] == [kept.id]
    for ask in (lists_client.files.retrieve, lists_client.files.content, lists_client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)
    with pytest.raises(openai.NotFoundError):
        run(lists_client, file.id)


def test_the_files_of_a_batch_expire(lists_client: OpenAI, clock: Clock) -> None:
    lines = upload(lists_client, chat_line("good", max_tokens=2), line("bad", {}))
    batch = lists_client.batches.create(
        input_file_id=lines,
        endpoint=CHAT,
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": DAY},
    )
    wait_until(lambda: lists_client.batches.retrieve(batch.id).status == "completed")
    batch = lists_client.batches.retrieve(batch.id)
    for file_id in (batch.output_file_id, batch.error_file_id):
        file = lists_client.files.retrieve(file_id or "")
        assert (file.purpose, file.expires_at) == ("batch_output", file.created_at + DAY)
    clock.advance(DAY)
    assert [file.id for file in lists_client.files.list()] == [lines]


def test_only_a_file_for_batches_makes_a_batch(lists_client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose is 'user_data'") as caught:
        run(lists_client, send(lists_client, "user_data").id)
    assert caught.value.param == "input_file_id"
    for purpose in ("assistants", "fine-tune", "vision", "batch_output"):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            send(lists_client, purpose)
        assert refused.value.param == "purpose"


def test_limits_of_metadata(lists_client: OpenAI) -> None:
    file_id = send(lists_client).id

    def create(metadata: dict[str, str] | None) -> Any:
        return lists_client.batches.create(
            input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata=metadata
        )

    most = {f"{number:064}": "x" * 512 for number in range(16)}
    assert create(most).metadata == most
    assert create({}).metadata == {}
    assert create(None).metadata is None
    for metadata in (most | {"more": ""}, {"k" * 65: ""}, {"k": "x" * 513}):
        with pytest.raises(openai.UnprocessableEntityError, match="metadata"):
            create(metadata)


def test_a_faulty_body_is_its_lines_answer(lists_client: OpenAI) -> None:
    """Whatever it is, as the route has it: the other lines are answered."""
    nested: Any = "x"
    for _ in range(100):
        nested = [nested]
    bodies = {
        "number": 5,
        "null": None,
        "list": [],
        "empty": {},
        "nested": {"messages": [{"role": "user", "content": nested}]},
        "model": {"messages": [{"role": "user", "content": "hello"}], "model": "another"},
        "long": {"messages": [{"role": "user", "content": "whale " * 3000}]},
        "stream": {"messages": [{"role": "user", "content": "hello"}], "stream": True},
    }
    lines = [line(name, body) for name, body in bodies.items()]
    batch = run(lists_client, upload(lists_client, *lines, chat_line("good", "line ends")))
    assert batch.status == "completed"
    assert list(records(lists_client, batch.output_file_id)) == ["good"]
    bad = records(lists_client, batch.error_file_id)
    assert list(bad) == list(bodies)
    found = {name: record["response"]["status_code"] for name, record in bad.items()}
    no_objects = dict.fromkeys(("number", "null", "list"), 400)
    assert found == dict.fromkeys(bodies, 422) | no_objects | {"model": 404, "long": 400}


def test_a_batch_goes_on_after_a_drain(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In the next server on the folder, with the lines that the first did not begin."""
    settings = ServerSettings(state_dir=tmp_path / "state", batch_concurrency=2)
    engine = FakeEngine(tokenizer, SCRIPT, hold_after=5)
    lines = [chat_line(str(number), "count up", max_tokens=3) for number in range(20)]
    with running(create_app(engine, make_model(tokenizer), settings)) as live:
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        batch = client.batches.create(
            input_file_id=upload(client, *lines), endpoint=CHAT, completion_window="24h"
        )
        wait_until(lambda: engine.is_held)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.server.is_draining)
        live.loop.call_soon_threadsafe(engine.gate.set)
        wait_until(lambda: live.has_ended)
    num_first = engine.num_done
    assert 0 < num_first < 20
    engine = FakeEngine(tokenizer, SCRIPT)
    with running(create_app(engine, make_model(tokenizer), settings)) as live:
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
        output_id = client.batches.retrieve(batch.id).output_file_id
        assert output_id is not None
        assert list(records(client, output_id)) == [str(number) for number in range(20)]
    assert engine.num_done == 20 - num_first


@pytest.mark.parametrize("is_strict", [False, True])
def test_unknown_fields_are_named_or_refused(tokenizer: Tokenizer, is_strict: bool) -> None:
    settings = ServerSettings(has_strict_fields=is_strict)
    with running(create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)) as live:
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        body = {"input_file_id": send(client).id, "endpoint": CHAT, "colour": "blue"}
        made = web.post(live.url + "/v1/batches", json=body)
        files, data = {"file": ("a", b"x")}, {"purpose": "batch", "colour": "blue"}
        sent = web.post(live.url + "/v1/files", files=files, data=data)
    for reply in (made, sent):
        if is_strict:
            assert reply.status_code == 422
            assert reply.json()["error"]["param"] == "colour"
        else:
            assert reply.status_code == 200
            assert reply.headers["x-rorqual-ignored-fields"] == "colour"
