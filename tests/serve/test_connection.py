"""A client's connection: closed by half, left, late, one of too many, told before it has sent all.

The engine is held by the test, and the loop's clock is moved: nothing waits for real time.
"""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import Live, running
from raw import Wire, talk
from served import make_model

from patience import HANG_SECONDS, wait_until
from rorqual.serve.app import create_app
from rorqual.serve.server import SPARE_FILES, connections_within_limits
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

BODY = b'{"prompt": "x"}'
HEADERS = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
SETTINGS = ServerSettings(max_connections=4, keep_alive_seconds=1000, max_body_bytes=100_000)


def post(body: bytes = BODY, *, version: bytes = b"1.1", headers: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/" + version + b"\r\n" + HEADERS % len(body)
    return head + headers + b"\r\n" + body


STREAM = post(b'{"prompt": "x", "stream": true}')


class Scene:
    """A server of four connections, and the engine behind it."""

    def __init__(self, live: Live, engine: FakeEngine) -> None:
        self.live, self.engine = live, engine

    def wire(self) -> Wire:
        return Wire(self.live.url)

    def hold(self) -> None:
        self.live.loop.call_soon_threadsafe(self.engine.gate.clear)
        wait_until(lambda: self.engine.is_held)

    def let_go(self) -> None:
        self.live.loop.call_soon_threadsafe(self.engine.gate.set)

    def has_connections(self, number: int) -> bool:
        return len(self.live.server.server_state.connections) == number


@pytest.fixture
def scene(tokenizer: Tokenizer) -> Iterator[Scene]:
    engine = FakeEngine(tokenizer)
    with running(create_app(engine, make_model(tokenizer), SETTINGS)) as live:
        yield Scene(live, engine)


@pytest.mark.parametrize("data", [post(), STREAM, post(version=b"1.0")], ids=["1.1", "sse", "1.0"])
def test_a_client_that_closes_its_half_has_its_whole_answer(scene: Scene, data: bytes) -> None:
    scene.hold()
    wire = scene.wire().send(data).close_half()
    wait_until(lambda: scene.engine.num_open == 1)
    if b"HTTP/1.1" in data:  # the server has seen the half close
        assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
    scene.let_go()
    heard = wire.hear()
    assert heard.finals == [200]
    assert b'"finish_reason":"stop"' in heard.data.replace(b": ", b":")
    assert scene.engine.num_cancelled == 0


def test_all_requests_before_a_half_close_are_answered(scene: Scene) -> None:
    scene.hold()
    wire = scene.wire().send(post() * 3).close_half()
    wait_until(lambda: scene.engine.num_open == 1)
    scene.let_go()
    assert wire.hear().finals == [200, 200, 200]


def test_half_a_request_before_a_half_close_is_none(scene: Scene) -> None:
    for data in (b"", HEALTH[:-2], post()[:-1]):
        assert scene.wire().send(data).close_half().hear().finals == []
    assert scene.engine.requests == []
    assert scene.wire().send(HEALTH + HEALTH[:-2]).close_half().hear().finals == [200]


@pytest.mark.parametrize("data", [post(), STREAM], ids=["whole", "stream"])
def test_a_client_that_leaves_is_no_client_that_closes_its_half(scene: Scene, data: bytes) -> None:
    """Nothing is written while the engine is held: only the probe tells that nobody reads."""
    scene.hold()
    wire = scene.wire().send(data)
    wait_until(lambda: scene.engine.num_open == 1)
    wire.close()
    wait_until(lambda: scene.engine.num_cancelled == 1)
    wait_until(lambda: scene.has_connections(0))


def test_a_client_that_leaves_after_its_half_close_is_noticed_when_something_is_sent(
    scene: Scene,
) -> None:
    scene.hold()
    wire = scene.wire().send(post()).close_half()
    wire.read_until(b"100 Continue\r\n\r\n")
    wait_until(lambda: scene.engine.num_open == 1)
    wire.close()
    scene.live.advance(SETTINGS.keep_alive_seconds)  # the sign of life
    wait_until(lambda: scene.engine.num_cancelled == 1)


def test_headers_have_a_limit_of_time(scene: Scene) -> None:
    silent, slow = scene.wire(), scene.wire().send(HEALTH[:-2])
    next_slow = scene.wire().send(HEALTH)
    next_slow.read_until(b"}")
    next_slow.send(HEALTH[:-2])
    wait_until(lambda: sum(c.conn.has_begun for c in _connections(scene)) == 2)
    scene.live.advance(SETTINGS.head_timeout_seconds)
    assert silent.hear().finals == []
    for wire in (slow, next_slow):
        heard = wire.hear()
        assert heard.finals == [408]
        assert b"slow_headers" in heard.data
    wait_until(lambda: scene.has_connections(0))


def test_an_answer_has_no_limit_of_time_from_its_headers(scene: Scene) -> None:
    scene.hold()
    wire = scene.wire().send(post(headers=b"Connection: close\r\n"))
    wait_until(lambda: scene.engine.num_open == 1)
    scene.live.advance(SETTINGS.head_timeout_seconds + SETTINGS.idle_seconds)
    scene.let_go()
    assert wire.hear().finals == [200]


def test_an_idle_connection_is_closed(scene: Scene) -> None:
    wire = scene.wire().send(HEALTH)
    wire.read_until(b"}")
    scene.live.advance(SETTINGS.idle_seconds)
    assert wire.hear().data == b""


def test_a_body_that_nobody_wants_ends_with_its_connection(scene: Scene) -> None:
    """A GET is answered before its body; what comes of that later keeps nothing open."""
    wire = scene.wire().send(HEALTH[:-2] + b"Content-Length: 1000\r\n\r\n")
    wire.read_until(b"}")
    wire.send(b"x")
    wait_until(lambda: any(c._head_timer is not None for c in _connections(scene)))
    scene.live.advance(SETTINGS.head_timeout_seconds)
    wire.hear()


def test_an_idle_connection_makes_room_for_a_new_one(scene: Scene) -> None:
    first = scene.wire().send(HEALTH)
    first.read_until(b"}")
    others = [scene.wire().send(HEALTH) for _ in range(3)]
    for wire in others:
        wire.read_until(b"}")
    fifth = scene.wire().send(HEALTH)
    assert b"200" in fifth.read_until(b"}")
    assert first.hear().data == b""
    for wire in others:
        assert b"200" in wire.send(HEALTH).read_until(b"}")


def test_one_connection_too_many_is_told_so(scene: Scene) -> None:
    scene.hold()
    busy = [scene.wire().send(post(headers=b"Connection: close\r\n")) for _ in range(4)]
    wait_until(lambda: scene.engine.num_open == 4)
    heard = scene.wire().hear()
    assert heard.finals == [503]
    assert b"retry-after: 2" in heard.data
    assert json.loads(heard.data.rpartition(b"\r\n")[2])["error"]["code"] == "overloaded"
    scene.let_go()
    for wire in busy:
        assert wire.hear().finals == [200]


def test_who_is_still_sending_reads_why_it_was_refused(scene: Scene) -> None:
    """A close with bytes unread resets the connection, and the answer may be lost on its way."""
    size = 8_000_000
    head = b"POST /v1/completions HTTP/1.1\r\n" + HEADERS % size + b"\r\n"
    wire = scene.wire().send(head)
    wire.read_until(b"body_too_large")
    for _ in range(0, size, 100_000):  # no reset: all of it is taken and thrown away
        wire.send(b"x" * 100_000)
    wire.close_half().hear()
    assert talk(scene.live.url, head + b"x" * 200_000).finals == [413]


def test_a_body_that_breaks_off_in_the_middle_of_its_answer_is_no_error_of_ours(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for data in (chunks + b"5\r\n{", HEALTH[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"):
        wire = scene.wire().send(data)
        if data.startswith(b"GET"):
            wire.read_until(b"}")
        wire.send(b"zzzzzz\r\nzz\r\n")
        assert len(wire.hear().finals) <= 1
    wait_until(lambda: scene.has_connections(0))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_server_ends_although_clients_linger(scene: Scene) -> None:
    refused = scene.wire().send(b"POST / HTTP/1.1\r\nHost: a b\r\nContent-Length: 9\r\n\r\n")
    refused.read_until(b"}")
    kept = scene.wire().send(HEALTH)
    kept.read_until(b"}")
    scene.live.stop()
    for wire in (refused, kept):
        wire.close()


def test_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.__setitem__(0, new[0]))
    assert connections_within_limits(100) == 100
    assert limits[0] == 1024  # never lowered
    assert connections_within_limits(1000) == 1000
    assert limits[0] == 2 * 1000 + SPARE_FILES  # each may send or receive a file
    assert connections_within_limits(5000) == (4096 - SPARE_FILES) // 2
    limits[:] = [64, 64]
    assert connections_within_limits(100) == 1


def _connections(scene: Scene) -> list[Any]:
    return list(scene.live.server.server_state.connections)


def unread(scene: Scene) -> Wire:
    """A client that has asked for much and reads nothing, whatever route it asked."""
    wire = scene.wire()
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.send(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200)
    wait_until(lambda: any(each.flow.write_paused for each in _connections(scene)))
    return wire


def test_who_reads_nothing_is_given_up_on_every_route(scene: Scene) -> None:
    with unread(scene).socket:
        scene.live.advance(SETTINGS.stall_seconds)
        wait_until(lambda: scene.has_connections(0))


def test_who_reads_slowly_is_not_given_up(scene: Scene) -> None:
    with unread(scene).socket:
        (connection,) = _connections(scene)
        sizes = [90, 70, 70, 70]  # as it waits, at a look, as it waits on, at a look
        connection.transport.get_write_buffer_size = lambda: sizes.pop(0)
        scene.live.loop.call_soon_threadsafe(connection.resume_writing)
        scene.live.loop.call_soon_threadsafe(connection.pause_writing)
        wait_until(lambda: len(sizes) == 3)
        scene.live.advance(SETTINGS.stall_seconds)
        wait_until(lambda: len(sizes) == 1)
        assert scene.has_connections(1)
        scene.live.advance(SETTINGS.stall_seconds)
        wait_until(lambda: scene.has_connections(0))


def test_who_is_connected_at_the_end_is_still_answered(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(last_call_seconds=HANG_SECONDS)
    with running(create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)) as live:
        silent = Wire(live.url)
        wait_until(lambda: len(live.server.server_state.connections) == 1)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.server.servers and not live.server.servers[0].is_serving())
        assert silent.send(post()).hear().finals == [503]
        wait_until(lambda: live.has_ended)


def test_who_never_asks_does_not_hold_up_the_end(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(last_call_seconds=1000)
    with running(create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)) as live:
        silent = Wire(live.url)
        wait_until(lambda: len(live.server.server_state.connections) == 1)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        wait_until(lambda: live.server.servers and not live.server.servers[0].is_serving())
        live.advance(1000)
        assert silent.hear().data == b""
        wait_until(lambda: live.has_ended)


def test_a_running_answer_of_a_drain_closes_its_connection(scene: Scene) -> None:
    """A client that keeps its connection would ask a server that has gone."""
    scene.hold()
    wire = scene.wire().send(post())
    wait_until(lambda: scene.engine.num_open == 1)
    scene.live.loop.call_soon_threadsafe(scene.live.server.begin_drain)
    wait_until(lambda: scene.live.server.is_draining)
    scene.let_go()
    heard = wire.hear()
    assert heard.finals == [200]
    assert b"connection: close" in heard.data.lower()
