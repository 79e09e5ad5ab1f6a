"""Many clients, slow clients, clients that leave, clients that send too much, and the end.

Oracle: the fake engine counts what is open, done and cancelled.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import web
from fake_engine import DEFAULT, FakeEngine
from live import Live, running
from openai import OpenAI
from served import SCRIPT, make_model

from patience import HANG_SECONDS, wait_until
from rorqual.engine import EngineOverloaded
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
COUNT = {"messages": [{"role": "user", "content": "count up"}]}
CHAT = "/v1/chat/completions"
LATE = HANG_SECONDS
"""A limit that passes only when a test moves the clock."""


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
        with web.stream("POST", live.url + CHAT, json=HELLO | {"stream": True}) as response:
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
        with web.stream("POST", live.url + CHAT, json=HELLO) as response:
            chunks = response.iter_text()
            assert next(chunks) == "\n"
            held.release()
            rest = "".join(chunks)
        assert json.loads(rest)["choices"][0]["message"]["content"] == DEFAULT
        held.hold()
        # Released by the headers, which the first empty line brings: the client has to skip it.
        hooks: Any = {"response": [lambda response: held.release()]}
        http_client = httpx.Client(event_hooks=hooks)
        client = OpenAI(base_url=live.url + "/v1", api_key="none", http_client=http_client)
        messages: Any = HELLO["messages"]
        reply = client.chat.completions.create(model="sei", messages=messages)
        assert reply.choices[0].message.content == DEFAULT


@pytest.mark.parametrize("is_stream", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_client_that_leaves_cancels_its_answers(tokenizer: Tokenizer, is_stream: bool) -> None:
    engine = FakeEngine(tokenizer, SCRIPT, hold_after=3)
    with serving(tokenizer, engine) as live:
        with asking(live, COUNT | {"stream": is_stream, "n": 2}) as connection:
            wait_until(lambda: engine.is_held)  # both are in their middle
            if is_stream:
                assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: engine.num_cancelled == 2)
        assert (engine.num_open, engine.num_done) == (0, 0)
        wait_until(lambda: "disconnects_total 1.0" in web.get(live.url + "/metrics").text)
        text = web.get(live.url + "/metrics").text
        assert 'rorqual_answers_total{reason="cancelled"} 2.0' in text


def test_a_client_that_leaves_while_it_waits(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, keep_alive_seconds=60) as live:
        Held(live, engine).hold()
        with asking(live, HELLO):  # and leaves before the first sign of life
            wait_until(lambda: engine.num_open == 1)
        wait_until(lambda: engine.num_cancelled == 1)
        assert engine.num_open == 0


def test_a_full_queue_is_429(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, max_open=1)
    with serving(tokenizer, engine, retry_after_seconds=3) as live, ThreadPoolExecutor(1) as pool:
        held = Held(live, engine)
        held.hold()
        first = pool.submit(web.post, live.url + CHAT, json=HELLO)
        wait_until(lambda: engine.num_open == 1)
        for fields in ({}, {"stream": True}, {"n": 1}):
            refused = web.post(live.url + CHAT, json=HELLO | fields)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "3"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="sei", prompt="x")
        held.release()
        assert first.result().status_code == 200
        assert engine.num_open == 0


def test_too_many_requests_at_once_are_429(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, max_concurrent_requests=2) as live:
        held = Held(live, engine)
        held.hold()
        with ThreadPoolExecutor(2) as pool:
            running_ones = [pool.submit(web.post, live.url + CHAT, json=HELLO) for _ in "ab"]
            wait_until(lambda: engine.num_open == 2)
            refused = web.post(live.url + CHAT, json=HELLO)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) > 0
            assert web.get(live.url + "/health").status_code == 200
            assert web.get(live.url + "/v1/models").status_code == 200
            held.release()
            assert [one.result().status_code for one in running_ones] == [200, 200]


def test_a_long_answer_is_cut_by_the_timeout(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, SCRIPT, hold_after=1)
    limits = {"request_timeout_seconds": LATE, "keep_alive_seconds": 2 * LATE}
    with serving(tokenizer, engine, **limits) as live, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(web.post, live.url + CHAT, json=COUNT)
        wait_until(lambda: engine.is_held)
        live.advance(LATE)
        whole = answer.result()
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert whole.headers["x-should-retry"] == "false"
        Held(live, engine).release()
        engine.hold_after = 2
        with web.stream("POST", live.url + CHAT, json=COUNT | {"stream": True}) as streamed:
            assert streamed.status_code == 200  # its first piece is here
            live.advance(LATE)
            last = streamed.read().decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: engine.num_cancelled == 2)
        assert engine.num_open == 0


def test_an_error_after_the_stream_began_is_an_event(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, SCRIPT, hold_after=2)
    with serving(tokenizer, engine) as live:
        client = OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        messages: Any = COUNT["messages"]
        stream = client.chat.completions.create(model="sei", messages=messages, stream=True)
        next(iter(stream))
        wait_until(lambda: engine.is_held)
        engine.problem = EngineOverloaded("gone")
        Held(live, engine).release()
        with pytest.raises(openai.APIError, match="try again later"):
            list(stream)


def test_a_large_body_is_413(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, max_body_bytes=1000) as live:
        body = json.dumps(HELLO | {"user": "x" * 2000}).encode()
        headers = {"content-type": "application/json"}
        told = web.post(live.url + CHAT, content=body, headers=headers)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")
        for num_bytes, status in ((1000, 200), (1001, 413)):
            body = json.dumps(HELLO).encode().ljust(num_bytes)
            assert web.post(live.url + CHAT, content=body, headers=headers).status_code == status
        body = body.ljust(2000)
        untold = web.post(live.url + CHAT, content=iter([body[:900], body[900:]]), headers=headers)
        assert untold.status_code == 413
        assert web.post(live.url + CHAT, json=HELLO).status_code == 200
        wait_until(lambda: live.app.state.service.num_in_flight == 0)


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 50])
@pytest.mark.parametrize("excess", [0, 1])
def test_a_chunked_body_is_summed_against_the_limit(
    tokenizer: Tokenizer, num_pieces: int, excess: int
) -> None:
    """Exactly the limit is taken, one byte more is not, in however many pieces it comes."""
    limit = 1000
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, max_body_bytes=limit) as live:
        short = json.dumps(HELLO | {"user": ""}).encode()
        body = json.dumps(HELLO | {"user": "x" * (limit + excess - len(short))}).encode()
        assert len(body) == limit + excess
        size = -(-len(body) // num_pieces)
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        headers = {"content-type": "application/json"}
        answer = httpx.post(live.url + CHAT, content=iter(pieces), headers=headers)
        assert answer.request.headers["transfer-encoding"] == "chunked"
        assert answer.status_code == (413 if excess else 200)
        told = httpx.post(live.url + CHAT, content=body, headers=headers)
        assert told.status_code == answer.status_code
        assert len(engine.requests) == (0 if excess else 2)
        wait_until(lambda: live.app.state.service.num_in_flight == 0)


def test_a_body_that_never_ends_is_408(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine, body_timeout_seconds=LATE) as live:
        service = live.app.state.service
        with raw(live) as connection:
            connection.sendall(request_head(live, 1000) + b'{"messages"')
            wait_until(lambda: service.num_in_flight == 1)
            live.advance(LATE)
            assert b"408" in connection.recv(4096).split(b"\r\n")[0]
        wait_until(lambda: service.num_in_flight == 0)
        assert engine.requests == []
        assert web.post(live.url + CHAT, json=HELLO).status_code == 200


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
        assert web.post(live.url + CHAT, json=HELLO).status_code == 200


def raw(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=HANG_SECONDS)


@contextmanager
def asking(live: Live, body: dict[str, Any], path: str = CHAT) -> Iterator[socket.socket]:
    """A client that has asked, and leaves at the end of the block."""
    content = json.dumps(body).encode()
    with raw(live) as connection:
        connection.sendall(request_head(live, len(content), path) + content)
        yield connection


def request_head(live: Live, num_bytes: int, path: str = CHAT) -> bytes:
    host = live.url.removeprefix("http://")
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"content-length: {num_bytes}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.parametrize("stall_seconds", [HANG_SECONDS, 0.5])
def test_a_client_that_does_not_read_stalls_nobody_and_is_given_up(
    tokenizer: Tokenizer, stall_seconds: float
) -> None:
    """Others are answered while its own answer cannot be sent; given up it is when its time is
    over, and not before.
    """
    engine = FakeEngine(tokenizer, {"endless": "whale " * 1900}, step_tokens=1)
    with serving(tokenizer, engine, stall_seconds=stall_seconds) as live:
        service = live.app.state.service
        prompt = {"prompt": ["endless"] * 4, "logprobs": 20, "stream": True, "max_tokens": 1800}
        with asking(live, prompt, "/v1/completions") as connection:  # more than sockets hold
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wait_until(lambda: engine.num_pieces >= 4)
            assert web.post(live.url + CHAT, json=HELLO).status_code == 200
            if stall_seconds < HANG_SECONDS:
                wait_until(lambda: service.num_in_flight == 0)
                assert engine.num_open == 0
                return
            wait_until(lambda: engine.num_open == 0)  # all is said, but not yet sent
            assert service.num_in_flight == 1
            assert web.post(live.url + CHAT, json=HELLO).status_code == 200
        wait_until(lambda: service.num_in_flight == 0)


def test_many_clients_at_once(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, step_seconds=0.001)
    with serving(tokenizer, engine) as live, ThreadPoolExecutor(16) as pool:
        body = HELLO | {"stream": True}
        replies = list(pool.map(lambda _: web.post(live.url + CHAT, json=body), range(48)))
        assert {reply.status_code for reply in replies} == {200}
        assert all(reply.text.endswith("data: [DONE]\n\n") for reply in replies)
        assert (engine.num_open, engine.num_done) == (0, 48)


def test_draining_finishes_what_runs_and_refuses_the_rest(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(tokenizer, engine) as live, ThreadPoolExecutor(2) as pool:
        held = Held(live, engine)
        held.hold()
        bodies = [HELLO, HELLO | {"stream": True}]
        answers = [pool.submit(web.post, live.url + CHAT, json=body) for body in bodies]
        wait_until(lambda: engine.num_open == 2)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.server.is_draining)
        refused = web.post(live.url + CHAT, json=HELLO)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert web.get(live.url + "/ready").status_code == 503
        assert web.get(live.url + "/health").status_code == 200
        held.release()
        whole, streamed = (answer.result() for answer in answers)
        assert whole.json()["choices"][0]["message"]["content"] == DEFAULT
        assert streamed.text.endswith("data: [DONE]\n\n")
        wait_until(lambda: live.has_ended)
        assert engine.is_closed
        assert engine.num_cancelled == 0


def test_a_drain_that_takes_too_long_cancels(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with (
        serving(tokenizer, engine, drain_timeout_seconds=LATE) as live,
        ThreadPoolExecutor(1) as pool,
    ):
        Held(live, engine).hold()
        answer = pool.submit(web.post, live.url + CHAT, json=HELLO)
        wait_until(lambda: engine.num_open == 1)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.notices)  # its time runs from here
        live.advance(LATE)
        wait_until(lambda: live.has_ended)
        assert engine.num_cancelled == 1
        # With status 503, or behind a sign of life.
        assert answer.result().json()["error"]["code"] == "overloaded"
        assert any("did not finish" in notice for notice in live.notices)
