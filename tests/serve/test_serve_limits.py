"""Many clients, slow clients, clients that leave, clients that send too much, and the end.

Oracle: the fake engine counts what is open, done and cancelled.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fake_engine import DEFAULT, FakeEngine
from live import Live, running, wait_until
from openai import OpenAI
from served import SCRIPT, make_model

from rorqual.engine import EngineOverloaded
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
COUNT = {"messages": [{"role": "user", "content": "count up"}]}
CHAT = "/v1/chat/completions"


class Held:
    """A server whose engine answers only when told to."""

    def __init__(self, live: Live, engine: FakeEngine) -> None:
        self.live, self.engine = live, engine
        self.url = live.url

    def hold(self) -> None:
        self._tell(self.engine.gate.clear)

    def release(self) -> None:
        self._tell(self.engine.gate.set)

    def _tell(self, action: Callable[[], None]) -> None:
        async def act() -> None:
            action()

        asyncio.run_coroutine_threadsafe(act(), self.live.loop).result(10)


def serving(tokenizer: Tokenizer, engine: FakeEngine, **limits: Any) -> Any:
    return running(create_app(engine, make_model(tokenizer), ServerSettings(**limits)))


def test_a_queued_stream_gets_comments(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, keep_alive_seconds=0.05) as live:
        held = Held(live, engine)
        held.hold()
        with httpx.stream("POST", live.url + CHAT, json=HELLO | {"stream": True}) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
            held.release()
            rest = "\n".join(lines)
        assert DEFAULT.split()[0] in rest
        assert "data: [DONE]" in rest


def test_a_queued_reply_gets_empty_lines_and_stays_json(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, keep_alive_seconds=0.05) as live:
        held = Held(live, engine)
        held.hold()
        with httpx.stream("POST", live.url + CHAT, json=HELLO) as response:
            chunks = response.iter_text()
            assert next(chunks) == "\n"
            held.release()
            rest = "".join(chunks)
        assert json.loads(rest)["choices"][0]["message"]["content"] == DEFAULT
        held.hold()
        threading.Timer(0.2, held.release).start()
        client = OpenAI(base_url=live.url + "/v1", api_key="none")
        messages: Any = HELLO["messages"]
        reply = client.chat.completions.create(model="sei", messages=messages)
        assert reply.choices[0].message.content == DEFAULT


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_cancels_its_answers(tokenizer: Tokenizer, is_stream: bool) -> None:
    engine = FakeEngine(tokenizer, SCRIPT, step_seconds=0.02)
    with serving(tokenizer, engine) as live:
        body = COUNT | {"stream": is_stream, "n": 2}
        if is_stream:
            with httpx.stream("POST", live.url + CHAT, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(live.url + CHAT, json=body, timeout=0.3)
        wait_until(lambda: engine.num_open == 0)
        assert (engine.num_cancelled, engine.num_done) == (2, 0)
        text = httpx.get(live.url + "/metrics").text
        assert "rorqual_client_disconnects_total 1.0" in text
        assert 'rorqual_answers_total{reason="cancelled"} 2.0' in text


def test_a_client_that_leaves_while_it_waits(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, keep_alive_seconds=60) as live:
        Held(live, engine).hold()
        with pytest.raises(httpx.ReadTimeout):  # before the first sign of life
            httpx.post(live.url + CHAT, json=HELLO, timeout=httpx.Timeout(5, read=0.5))
        wait_until(lambda: engine.num_open == 0)
        assert engine.num_cancelled == 1


def test_a_full_queue_is_429(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, max_open=1)
    with serving(tokenizer, engine, retry_after_seconds=3) as live, ThreadPoolExecutor(1) as pool:
        held = Held(live, engine)
        held.hold()
        first = pool.submit(httpx.post, live.url + CHAT, json=HELLO)
        wait_until(lambda: engine.num_open == 1)
        for fields in ({}, {"stream": True}, {"n": 4}):
            refused = httpx.post(live.url + CHAT, json=HELLO | fields)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "3"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="sei", prompt="x")
        held.release()
        assert first.result().status_code == 200
        assert engine.num_open == 0


def test_too_many_requests_at_once_are_503(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, max_concurrent_requests=2) as live:
        held = Held(live, engine)
        held.hold()
        with ThreadPoolExecutor(2) as pool:
            running_ones = [pool.submit(httpx.post, live.url + CHAT, json=HELLO) for _ in "ab"]
            wait_until(lambda: engine.num_open == 2)
            refused = httpx.post(live.url + CHAT, json=HELLO)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) > 0
            assert httpx.get(live.url + "/health").status_code == 200
            assert httpx.get(live.url + "/v1/models").status_code == 200
            held.release()
            assert [one.result().status_code for one in running_ones] == [200, 200]


def test_a_long_answer_is_cut_by_the_timeout(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, SCRIPT, step_seconds=0.02)
    with serving(tokenizer, engine, request_timeout_seconds=0.3) as live:
        whole = httpx.post(live.url + CHAT, json=COUNT)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert whole.headers["x-should-retry"] == "false"
        streamed = httpx.post(live.url + CHAT, json=COUNT | {"stream": True})
        assert streamed.status_code == 200
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert engine.num_open == 0
        assert engine.num_cancelled == 2


def test_an_error_after_the_stream_began_is_an_event(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, SCRIPT, step_seconds=0.02)
    with serving(tokenizer, engine) as live:
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        messages: Any = COUNT["messages"]
        stream = client.chat.completions.create(model="sei", messages=messages, stream=True)
        next(iter(stream))
        engine.problem = EngineOverloaded("gone")
        with pytest.raises(openai.APIError, match="try again later"):
            list(stream)


def test_a_large_body_is_413(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, max_body_bytes=1000) as live:
        body = json.dumps(HELLO | {"user": "x" * 2000}).encode()
        headers = {"content-type": "application/json"}
        told = httpx.post(live.url + CHAT, content=body, headers=headers)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")
        untold = httpx.post(
            live.url + CHAT, content=iter([body[:900], body[900:]]), headers=headers
        )
        assert untold.status_code == 413
        assert httpx.post(live.url + CHAT, json=HELLO).status_code == 200
        wait_until(lambda: live.app.state.service.num_in_flight == 0)


def test_a_body_that_never_ends_is_408(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, body_timeout_seconds=0.2) as live:
        with raw(live) as connection:
            connection.sendall(request_head(live, 1000) + b'{"messages"')
            assert b"408" in connection.recv(4096).split(b"\r\n")[0]
        assert httpx.post(live.url + CHAT, json=HELLO).status_code == 200


def test_a_client_that_leaves_within_its_body_leaves_nothing(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine) as live:
        service = live.app.state.service
        for _ in range(3):
            with raw(live) as connection:
                connection.sendall(request_head(live, 1000) + b'{"messages": [')
                wait_until(lambda: service.num_in_flight == 1)
            wait_until(lambda: service.num_in_flight == 0)
        assert engine.requests == []
        assert httpx.post(live.url + CHAT, json=HELLO).status_code == 200


def raw(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request_head(live: Live, num_bytes: int, path: str = CHAT) -> bytes:
    host = live.url.removeprefix("http://")
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"content-length: {num_bytes}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_client_that_does_not_read_stalls_nobody_and_is_given_up(tokenizer: Tokenizer) -> None:
    endless = {"endless": "whale " * 1900}
    engine = FakeEngine(tokenizer, endless, step_tokens=1)
    with serving(tokenizer, engine, stall_seconds=0.5) as live:
        prompt = {"prompt": ["endless"] * 64, "logprobs": 20, "stream": True, "max_tokens": 1800}
        body = json.dumps(prompt).encode()
        with raw(live) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request_head(live, len(body), "/v1/completions") + body)
            wait_until(lambda: engine.num_open > 0)
            since = time.monotonic()
            assert httpx.post(live.url + CHAT, json=HELLO, timeout=20).status_code == 200
            assert time.monotonic() - since < 15
            wait_until(lambda: engine.num_open == 0, 30)
            wait_until(lambda: live.app.state.service.num_in_flight == 0, 30)


def test_many_clients_at_once(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, step_seconds=0.001)
    with serving(tokenizer, engine) as live, ThreadPoolExecutor(16) as pool:
        body = HELLO | {"stream": True}
        replies = list(pool.map(lambda _: httpx.post(live.url + CHAT, json=body), range(48)))
        assert {reply.status_code for reply in replies} == {200}
        assert all(reply.text.endswith("data: [DONE]\n\n") for reply in replies)
        assert (engine.num_open, engine.num_done) == (0, 48)


def test_draining_finishes_what_runs_and_refuses_the_rest(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine) as live, ThreadPoolExecutor(2) as pool:
        held = Held(live, engine)
        held.hold()
        bodies = [HELLO, HELLO | {"stream": True}]
        answers = [pool.submit(httpx.post, live.url + CHAT, json=body) for body in bodies]
        wait_until(lambda: engine.num_open == 2)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.server.is_draining)
        refused = httpx.post(live.url + CHAT, json=HELLO)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(live.url + "/ready").status_code == 503
        assert httpx.get(live.url + "/health").status_code == 200
        held.release()
        whole, streamed = (answer.result() for answer in answers)
        assert whole.json()["choices"][0]["message"]["content"] == DEFAULT
        assert streamed.text.endswith("data: [DONE]\n\n")
        wait_until(lambda: live.has_ended, 20)
        assert engine.is_closed
        assert engine.num_cancelled == 0


def test_a_drain_that_takes_too_long_cancels(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with (
        serving(tokenizer, engine, drain_timeout_seconds=0.2) as live,
        ThreadPoolExecutor(1) as pool,
    ):
        Held(live, engine).hold()
        answer = pool.submit(httpx.post, live.url + CHAT, json=HELLO)
        wait_until(lambda: engine.num_open == 1)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.has_ended, 20)
        assert engine.num_cancelled == 1
        assert answer.exception() is not None or answer.result().status_code >= 500
        assert any("did not finish" in notice for notice in live.notices)
