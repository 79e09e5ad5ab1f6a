"""Files and offline batches, through the official client.

Oracle: the chat and completion routes themselves, which a batch must agree with.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import web
from fake_engine import DEFAULT, FakeEngine
from live import Live, running
from openai import OpenAI
from served import SCRIPT, make_model

from patience import wait_until
from rorqual.serve import batch_lines, batches
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

CHAT = "/v1/chat/completions"
LIMIT_BYTES = 20_000


@pytest.fixture
def batch_engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, SCRIPT, max_open=2, step_tokens=8)


@pytest.fixture
def batch_live(batch_engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[Live]:
    settings = ServerSettings(
        max_file_bytes=LIMIT_BYTES, max_body_bytes=8000, max_files=6, batch_concurrency=4
    )
    with running(create_app(batch_engine, make_model(tokenizer), settings)) as live:
        yield live


@pytest.fixture
def batch_client(batch_live: Live) -> OpenAI:
    return OpenAI(base_url=batch_live.url + "/v1", api_key="none", max_retries=0)


def line(custom_id: str, body: Any, url: str = CHAT, method: str = "POST") -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def chat_line(custom_id: str, text: str = "hello", **fields: Any) -> str:
    return line(custom_id, {"messages": [{"role": "user", "content": text}], **fields})


def upload(client: OpenAI, *lines: str, name: str = "in.jsonl") -> str:
    content = io.BytesIO("\n".join(lines).encode())
    return client.files.create(file=(name, content), purpose="batch").id


def run(client: OpenAI, file_id: str, endpoint: Any = CHAT) -> Any:
    batch = client.batches.create(
        input_file_id=file_id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )
    ended = ("completed", "failed", "cancelled")
    wait_until(lambda: client.batches.retrieve(batch.id).status in ended)
    return client.batches.retrieve(batch.id)


def records(client: OpenAI, file_id: str) -> dict[str, Any]:
    text = client.files.content(file_id).text
    return {record["custom_id"]: record for record in map(json.loads, text.splitlines())}


def test_a_batch_answers_every_line(batch_client: OpenAI, batch_engine: FakeEngine) -> None:
    questions = [chat_line(str(number), "count up", max_tokens=5) for number in range(12)]
    faulty = [chat_line("bad", temperature=9), chat_line("streamed", stream=True)]
    batch = run(batch_client, upload(batch_client, *questions, "", *faulty))
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (14, 12, 2)
    assert batch.metadata == {"a": "b"}
    good = records(batch_client, batch.output_file_id)
    assert sorted(good, key=int) == [str(number) for number in range(12)]
    body = good["3"]["response"]["body"]
    assert good["3"]["response"]["status_code"] == 200
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 5
    bad = records(batch_client, batch.error_file_id)
    assert {name: entry["response"]["status_code"] for name, entry in bad.items()} == {
        "bad": 422,
        "streamed": 422,
    }
    assert bad["bad"]["response"]["body"]["error"]["param"] == "temperature"
    assert batch_engine.num_open == 0  # although two at a time were all that it took


def test_completions_in_a_batch(batch_client: OpenAI) -> None:
    file_id = upload(batch_client, line("a", {"prompt": "hello"}, "/v1/completions"))
    batch = run(batch_client, file_id, "/v1/completions")
    body = records(batch_client, batch.output_file_id)["a"]["response"]["body"]
    assert body["choices"][0]["text"] == DEFAULT


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([chat_line("a"), "{"], "invalid_line", 2),
        ([chat_line("a"), "", chat_line("a")], "duplicate_custom_id", 3),
        ([line("a", {}, "/v1/completions")], "mismatched_url", 1),
        ([line("a", {}, "/v1/embeddings")], "invalid_line", 1),
        ([line("a", {}, method="GET")], "invalid_line", 1),
        (['{"custom_id": "a"}'], "invalid_line", 1),
        (["  "], "empty_file", None),
        ([chat_line("a", "x" * 9000)], "line_too_long", 1),
    ],
)
def test_a_faulty_file_fails_before_anything_runs(
    batch_client: OpenAI, batch_engine: FakeEngine, lines: Any, code: str, number: int | None
) -> None:
    batch = run(batch_client, upload(batch_client, *lines))
    assert batch.status == "failed"
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)
    assert batch_engine.requests == []


def test_a_cancelled_batch_keeps_what_it_has(
    batch_live: Live, batch_client: OpenAI, batch_engine: FakeEngine
) -> None:
    # Two lines run side by side: when three times one's pieces are out, one of them has ended.
    num_tokens = len(batch_engine.tokenizer.encode(SCRIPT["count up"])) + 1
    batch_engine.hold_after = 3 * math.ceil(num_tokens / batch_engine.step_tokens)
    file_id = upload(batch_client, *[chat_line(str(n), "count up") for n in range(40)])
    batch = batch_client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h"
    )

    def progress() -> int:
        counts = batch_client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        return counts.completed

    wait_until(lambda: batch_engine.is_held)
    wait_until(lambda: progress() > 0)
    assert batch_client.batches.cancel(batch.id).status == "cancelling"
    batch_live.loop.call_soon_threadsafe(batch_engine.gate.set)
    wait_until(lambda: batch_client.batches.retrieve(batch.id).status == "cancelled")
    output_id = batch_client.batches.retrieve(batch.id).output_file_id
    assert output_id is not None
    assert 0 < len(records(batch_client, output_id)) < 40
    assert batch_engine.num_open == 0


def test_files_are_kept_listed_and_deleted(batch_client: OpenAI, batch_live: Live) -> None:
    name = "../../etc/passwd"
    file_id = upload(batch_client, chat_line("a"), name=name)
    assert [file.id for file in batch_client.files.list()] == [file_id]
    kept = batch_client.files.retrieve(file_id)
    assert (kept.filename, kept.purpose, kept.bytes) == (name, "batch", len(chat_line("a")))
    assert batch_client.files.content(file_id).text == chat_line("a")
    folder = batch_live.app.state.store.files.folder
    assert {path.name for path in folder.iterdir()} == {file_id}
    assert os.stat(folder).st_mode & 0o077 == 0
    assert batch_client.files.delete(file_id).deleted
    assert list(folder.iterdir()) == []
    with pytest.raises(openai.NotFoundError):
        batch_client.files.retrieve(file_id)


def test_what_is_not_a_file_id_is_404(batch_live: Live) -> None:
    for file_id in ("file-x", "..%2f..%2fetc%2fpasswd", "%00", "file-" + "0" * 30):
        for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
            assert web.get(batch_live.url + path).status_code == 404
    body = {"input_file_id": "../../etc/passwd", "endpoint": CHAT}
    assert web.post(batch_live.url + "/v1/batches", json=body).status_code == 404


def test_limits_of_files(batch_live: Live, batch_client: OpenAI) -> None:
    url = batch_live.url + "/v1/files"

    def send(content: bytes, **fields: str) -> httpx.Response:
        return web.post(url, files={"file": ("a", content)}, data={"purpose": "batch"} | fields)

    assert send(b"x" * (LIMIT_BYTES + 1)).json()["error"]["code"] == "file_too_large"
    assert send(b"x" * 200_000).status_code == 413
    assert send(b"x", purpose="fine-tune").json()["error"]["param"] == "purpose"
    assert send(b"x", expires_after="1").json()["error"]["param"] == "expires_after"
    anchored = {"expires_after[anchor]": "created_at"}
    for seconds in ("3599", "2592001", "x", "-1", "1e4", ""):
        refused = send(b"x", **anchored, **{"expires_after[seconds]": seconds})
        assert (refused.status_code, refused.json()["error"]["param"]) == (
            422,
            "expires_after.seconds",
        )
    refused = send(b"x", **{"expires_after[seconds]": "3600"})
    assert refused.json()["error"]["param"] == "expires_after.anchor"
    assert web.post(url, data={"purpose": "batch"}).json()["error"]["param"] == "file"
    assert web.post(url, json={"purpose": "batch"}).status_code in (400, 422)
    for _ in range(6):
        upload(batch_client, chat_line("a"))
    full = send(b"x")
    assert (full.status_code, full.json()["error"]["code"]) == (429, "storage_full")


def test_a_file_may_have_so_many_lines_and_no_more(
    batch_client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINES", 3)
    lines = [chat_line(str(number), max_tokens=2) for number in range(4)]
    assert run(batch_client, upload(batch_client, *lines[:3])).status == "completed"
    refused = run(batch_client, upload(batch_client, *lines))
    assert refused.status == "failed"
    assert [fault.code for fault in refused.errors.data] == ["too_many_requests"]


def test_so_many_faults_of_a_file_are_told_and_no_more(
    batch_client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_SHOWN_FAULTS", 3)
    for num_faults in (2, 3, 4, 5):
        refused = run(batch_client, upload(batch_client, chat_line("good"), *["{"] * num_faults))
        told = [fault.line for fault in refused.errors.data]
        assert told == list(range(2, 2 + min(num_faults, 3)))


def test_the_oldest_batch_that_has_ended_makes_room(
    batch_client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCHES", 2)
    file_id = upload(batch_client, chat_line("a", max_tokens=2))
    ids = [run(batch_client, file_id).id for _ in range(3)]
    assert [batch.id for batch in batch_client.batches.list()] == [ids[2], ids[1]]
    with pytest.raises(openai.NotFoundError):
        batch_client.batches.retrieve(ids[0])


def test_owners_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(api_keys=("first-key-0001", "second-key-0002"))
    app = create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)
    with running(app) as live:
        first, second = (
            OpenAI(base_url=live.url + "/v1", api_key=key) for key in settings.api_keys
        )
        file_id = upload(first, chat_line("a"))
        batch = run(first, file_id)
        assert list(second.files.list()) == []
        assert list(second.batches.list()) == []
        for ask in (
            lambda: second.files.content(file_id),
            lambda: second.files.delete(file_id),
            lambda: second.batches.retrieve(batch.id),
            lambda: second.batches.cancel(batch.id),
            lambda: run(second, file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        assert first.batches.retrieve(batch.id).status == "completed"


def test_draining_ends_a_batch_between_its_lines(
    batch_live: Live, batch_client: OpenAI, batch_engine: FakeEngine
) -> None:
    batch_engine.hold_after = 1
    file_id = upload(batch_client, *[chat_line(str(n), "count up") for n in range(40)])
    batch_client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    wait_until(lambda: batch_engine.is_held)
    batch_live.loop.call_soon_threadsafe(batch_live.server.begin_drain)
    wait_until(lambda: batch_live.server.is_draining)
    batch_live.loop.call_soon_threadsafe(batch_engine.gate.set)
    wait_until(lambda: batch_live.has_ended)
    assert batch_engine.num_cancelled == 0
    assert 0 < batch_engine.num_done < 40


def test_ending_at_once_removes_a_temporary_folder(
    batch_live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    folder = batch_live.app.state.store.folder
    assert folder.exists()
    batch_live.server.end_at_once()
    assert (folder.exists(), codes) == (False, [1])
