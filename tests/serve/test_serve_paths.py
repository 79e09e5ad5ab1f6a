"""Slashes at the end, HEAD, and routes that are not here. Oracle: the same request's usual form."""

from __future__ import annotations

import pytest
import web
from live import Live
from openai import APIStatusError, OpenAI

pytestmark = pytest.mark.concurrency

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(live: Live, path: str) -> None:
    head, whole = web.head(live.url + path), web.get(live.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_slash_at_the_end_changes_nothing(live: Live, end: str) -> None:
    for path in ("/v1/models", "/v1/models/sei", "/models", "/health", "/ready", "/openapi.json"):
        plain, slashed = web.get(live.url + path), web.get(live.url + path + end)
        assert (slashed.status_code, slashed.text) == (200, plain.text)
    answer = web.post(live.url + "/v1/chat/completions" + end, json=HELLO)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert web.post(live.url + "/tokenize" + end, json={"prompt": "x"}).json()["count"] == 2
    assert web.get(live.url + end).headers["content-type"].startswith("text/html")


def test_there_are_no_embeddings(client: OpenAI, live: Live) -> None:
    with pytest.raises(APIStatusError, match="no embeddings") as caught:
        client.embeddings.create(model="sei", input="x")
    assert (caught.value.status_code, caught.value.code) == (501, "unsupported")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert web.post(live.url + "/embeddings", json={}).status_code == 501
