"""Every reply has a name. Oracles: the official client, which shows it; a client's own name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from openai import NotFoundError, OpenAI
from raw import Wire
from served import SCRIPT, make_model

from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
PAGE = "https://whale.example"


@pytest.fixture(scope="module")
def guarded(tokenizer: Tokenizer) -> Iterator[Live]:
    settings = ServerSettings(api_keys=("right-key-0001",), cors_origins=(PAGE,))
    with running(create_app(FakeEngine(tokenizer, SCRIPT), make_model(tokenizer), settings)) as it:
        yield it


def test_the_official_client_shows_it(client: OpenAI) -> None:
    ask: Any = client.chat.completions.create
    ids = [ask(model="sei", **CHAT)._request_id, client.models.list()._request_id]
    ids.append(client.responses.create(model="sei", input="hello")._request_id)
    with pytest.raises(NotFoundError) as caught:
        ask(model="nobody", **CHAT)
    ids.append(caught.value.request_id)
    raw = client.chat.completions.with_raw_response
    ids.append(raw.create(model="sei", stream=True, **CHAT).request_id)
    assert all(request_id.startswith("req_") for request_id in ids)
    assert len(set(ids)) == len(ids)


REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", CHAT | {"stream": True}),
    ("POST", "/v1/chat/completions", {}),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2}),
    ("POST", "/v1/messages", CHAT),
    ("POST", "/v1/messages", {}),
    ("POST", "/v1/embeddings", {}),
    ("POST", "/tokenize", {"prompt": "x"}),
    ("POST", "/v1/files", {}),
    ("GET", "/v1/files", None),
    ("GET", "/v1/batches/nothing", None),
    ("GET", "/v1/responses/nothing", None),
    ("DELETE", "/v1/models", None),
    ("GET", "/nowhere", None),
    ("GET", "/health", None),
    ("GET", "/", None),
]


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_every_reply_has_it_and_tells_back_a_clients_own(
    live: Live, method: str, path: str, body: Any
) -> None:
    for own in (None, "mine-7/a", "x" * 128, "x" * 129, "two words"):
        headers = {} if own is None else {"X-Request-Id": own}
        reply = web.request(method, live.url + path, json=body, headers=headers)
        [told] = reply.headers.get_list("x-request-id")
        is_kept = own is not None and len(own) <= 128 and " " not in own
        assert told == own if is_kept else told.startswith("req_")
        if path == "/v1/messages":
            assert reply.headers["request-id"] == told


def test_refusals_have_it_too(guarded: Live, live: Live) -> None:
    assert web.get(guarded.url + "/v1/models").headers["x-request-id"].startswith("req_")
    heard = Wire(live.url).send(b"GET / HTTP/1.1\nHost: x\n\n").hear()
    assert heard.finals == [400]
    assert b"x-request-id: req_" in heard.data


def test_a_bug_has_it_too(live: Live, engine: FakeEngine) -> None:
    engine.problem = ZeroDivisionError("a secret")
    try:
        reply = web.post(live.url + "/v1/chat/completions", json=CHAT)
    finally:
        engine.problem = None
    assert reply.status_code == 500
    assert reply.headers.get_list("x-request-id")[0].startswith("req_")
    assert len(reply.headers.get_list("x-request-id")) == 1


def test_pages_may_read_it(guarded: Live) -> None:
    headers = {"origin": PAGE, "authorization": "Bearer right-key-0001"}
    for path in ("/v1/models", "/v1/messages"):
        reply = web.get(guarded.url + path, headers=headers)
        exposed = reply.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "request-id"} <= set(exposed)
