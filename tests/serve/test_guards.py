"""The guards around the routes, without a server. Oracle: the rules of docs/api.md, by hand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from live import running
from served import make_model
from starlette.datastructures import Headers

from rorqual.errors import UsageError
from rorqual.serve.app import create_app
from rorqual.serve.auth import AuthGuard, Keys, check_hosts, read_keys
from rorqual.serve.bodies import BYTES_A_SECOND, VALUES_A_SECOND, Pacer
from rorqual.serve.errors import ApiError
from rorqual.serve.json_values import check_values
from rorqual.serve.limits import MULTIPART_BYTES, LimitGuard, _Exchange
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

KEY = "first-key-0001"


class Ends:
    """Both ends of one request: the body's pieces, and what was answered."""

    def __init__(self, pieces: Sequence[bytes] = (b"",)) -> None:
        self.coming = [
            {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
            for number, piece in enumerate(pieces)
        ]
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        return self.coming.pop(0) if self.coming else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def code(self) -> str:
        return str(json.loads(self.sent[1]["body"])["error"]["code"])

    def header(self, name: str) -> str | None:
        return Headers(raw=list(self.sent[0]["headers"])).get(name)


def scope(path: str = "/v1/models", method: str = "GET", **headers: str) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": raw}


async def welcome(scope: Any, receive: Any, send: Any) -> None:
    """The routes: they read the body and say who asked."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    owner = scope.get("state", {}).get("owner")
    await send({"type": "http.response.body", "body": json.dumps(owner).encode()})


def guarded(settings: ServerSettings, asked: dict[str, Any]) -> Ends:
    ends = Ends()
    asyncio.run(AuthGuard(welcome, settings)(asked, ends.receive, ends.send))
    return ends


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, {"host": "localhost:8000"}, 200),
        ({}, {"host": "evil.example"}, 403),
        # A key makes the name nobody's business.
        ({"api_keys": (KEY,)}, {"host": "evil.example", "authorization": f"Bearer {KEY}"}, 200),
        ({"is_loopback": False}, {"host": "10.0.0.7:1", "origin": "http://10.0.0.7:1"}, 200),
        ({"is_loopback": False}, {"host": "10.0.0.7:1", "origin": "http://b:1"}, 403),
        ({"is_loopback": False}, {"host": "a:1", "origin": "http://a:1"}, 403),
        ({"allowed_hosts": ("a",)}, {"host": "a:1", "origin": "http://a:1"}, 200),
        ({"cors_origins": ("http://b:1",)}, {"host": "localhost", "origin": "http://b:1"}, 200),
        ({"cors_origins": ("http://b:1",)}, {"host": "localhost", "origin": "http://b:2"}, 403),
        ({"cors_origins": ("*",)}, {"host": "localhost", "origin": "http://b:2"}, 200),
        ({"cors_origins": ("*",)}, {"host": "evil.example", "origin": "http://b:2"}, 403),
        # Another site's page is refused before its key is looked at.
        ({"api_keys": (KEY,)}, {"host": "a", "origin": "http://b"}, 403),
        ({"api_keys": (KEY,)}, {"host": "a", "origin": "http://a"}, 401),
    ],
)
def test_hosts_and_origins(settings: Any, headers: dict[str, str], status: int) -> None:
    ends = guarded(ServerSettings(**settings), scope(**headers))
    assert ends.status == status


OWN = (
    "localhost", "localhost:8000", "localhost:", "LocalHost", "127.0.0.1", "127.0.0.1:65535",
    "127.8.9.10", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]",
)  # fmt: skip
NEVER = (
    "evil.example", "evil.example:8000", "EVIL.EXAMPLE", "evil@127.0.0.1", "a:b@localhost",
    "evil.example@localhost", "localhost@evil.example", "127.0.0.1.evil.example", "127.0.0.1.",
    "localhost.", "localhost.evil", "xlocalhost", "127.0.0.1:65536", "127.0.0.1:-1",
    "127.0.0.1:80:80", "127.0.0.1:x", "::1", "[::1", "::1]", "[::1]evil", "[localhost]", "127.1",
    "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.01", "localhost/", "localhost ",
    " localhost", "localhost,evil.example", "localhost#evil", "evil.example#localhost",
    "localhost\\evil", "localhost\tevil", "", ":8000", "%6cocalhost", "ⓛocalhost", "[::1%25eth0]",
    "whale.example.", "x.whale.example",
)  # fmt: skip


@pytest.mark.parametrize("is_loopback", [True, False])
def test_a_keyless_server_answers_to_no_name_that_somebody_else_may_own(is_loopback: bool) -> None:
    """On every bind; a name that its owner lets point here would open it to his pages."""
    settings = ServerSettings(is_loopback=is_loopback, allowed_hosts=("Whale.example",))
    for host in (*OWN, "whale.example", "WHALE.example:80"):
        assert guarded(settings, scope(host=host)).status == 200, host
    for host in NEVER:
        ends = guarded(settings, scope(host=host))
        assert (ends.status, ends.code) == (403, "wrong_host"), host
    for address in ("192.168.1.5:8000", "[fe80::1]", "[2001:db8::7]:80"):
        status = 403 if is_loopback else 200
        assert guarded(settings, scope(host=address)).status == status, address
    assert guarded(settings, scope()).status == 200  # HTTP/1.0 without a Host: no browser
    keyed = replace(settings, api_keys=(KEY,))
    for host in NEVER:
        asked = scope(host=host, authorization=f"Bearer {KEY}")
        assert guarded(keyed, asked).status == 200, host


@pytest.mark.parametrize("name", ["", "http://a", "a:80", "a/b", "a b", "[::1]", "é", "a@b"])
def test_a_host_to_allow_is_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="--allow-host"):
        check_hosts(["whale.example", name])
    check_hosts(["whale.example", "WHALE", "10.0.0.7"])


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/", True),
        ("/favicon.ico", True),
        ("/health", True),
        ("/ready", True),
        ("/page/main.js", True),
        ("/page", False),
        ("/pages/main.js", False),
        ("/health/", False),
        ("/v1/models", False),
    ],
)
def test_what_needs_no_key(path: str, is_open: bool) -> None:
    ends = guarded(ServerSettings(api_keys=(KEY,)), scope(path, host="a"))
    assert ends.status == (200 if is_open else 401)


def test_whoever_asks_has_a_name_only_with_a_key() -> None:
    assert guarded(ServerSettings(), scope(host="localhost")).sent[1]["body"] == b'""'
    settings = ServerSettings(api_keys=("other-key-0002", KEY))
    ends = guarded(settings, scope(host="a", authorization=f"bearer  {KEY} "))
    assert json.loads(ends.sent[1]["body"]) == Keys([KEY]).owner(f"Bearer {KEY}")


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY} x", "Bearer x"]
)
def test_what_is_no_key(given: str | None) -> None:
    assert Keys([KEY, "other-key-0002"]).owner(given) is None
    assert not Keys([]).are_needed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"first-key-0001\nsecond-key-\xc3\xa9\n", "line 2: the key"),
        (b"first-key-0001\n# a\n\nshort\n", "line 4: the key"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "no key"),
        (b"  # first-key-0001\n", "no key"),
    ],
)
def test_key_files_that_cannot_be_used(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_keys(path)


@pytest.fixture
def service(tokenizer: Tokenizer) -> Service:
    settings = ServerSettings(
        max_body_bytes=10, max_file_bytes=20, max_concurrent_requests=2, retry_after_seconds=7
    )
    service = Service(FakeEngine(tokenizer), make_model(tokenizer), settings)
    service.is_started = True
    return service


def limited(service: Service, asked: dict[str, Any], *pieces: bytes, app: Any = welcome) -> Ends:
    ends = Ends(pieces or (b"",))
    asyncio.run(LimitGuard(app, service)(asked, ends.receive, ends.send))
    return ends


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v1/completions", 10),
        ("/v1/files", 20 + MULTIPART_BYTES),
        ("/v1/files/", 20 + MULTIPART_BYTES),
        ("/v1/files/x", 10),
    ],
)
@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("num_pieces", [1, 2])
def test_a_body_has_its_routes_limit(
    service: Service, path: str, limit: int, is_told: bool, num_pieces: int
) -> None:
    for num_bytes, status in ((limit, 200), (limit + 1, 413)):
        body = bytes(num_bytes)
        pieces = [body] if num_pieces == 1 else [body[:5], body[5:]]
        headers = {"content_type": "multipart/form-data"}
        headers |= {"content_length": str(num_bytes)} if is_told else {}
        ends = limited(service, scope(path, "POST", **headers), *pieces)
        assert ends.status == status
        assert service.num_in_flight == 0
        if status == 413:
            assert ends.code == "body_too_large"
            assert ends.header("connection") == "close"
            assert len(ends.sent) == 2, "the route's own answer is dropped"
            if is_told:
                assert len(ends.coming) == num_pieces, "nothing of it was read"


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 19, "1" * 4999, "²", ""])
def test_a_length_that_is_none_is_left_to_the_bytes(service: Service, length: str) -> None:
    asked = scope("/v1/completions", "POST")
    asked["headers"] = [(b"content-length", length.encode("latin-1"))]
    assert limited(service, asked, bytes(10)).status == 200
    assert limited(service, asked, bytes(11)).status == 413


@pytest.mark.parametrize(
    ("state", "method", "status"),
    [
        ({"is_draining": True}, "POST", 503),
        ({"is_started": False}, "POST", 503),
        ({"in_flight": Counter({"address ": 1})}, "POST", 200),
        ({"in_flight": Counter({"address ": 2})}, "POST", 429),
        ({"in_flight": Counter({"other": 1})}, "POST", 200),
        ({"in_flight": Counter({"other": 2})}, "POST", 429),
        ({"is_draining": True}, "GET", 200),
        ({"in_flight": Counter({"address ": 2})}, "GET", 200),
    ],
)
def test_when_a_request_is_taken(
    service: Service, state: dict[str, Any], method: str, status: int
) -> None:
    for name, value in state.items():
        setattr(service, name, value)
    ends = limited(service, scope(method=method))
    assert ends.status == status
    assert service.in_flight == state.get("in_flight", Counter())
    if status in (429, 503):
        assert ends.header("retry-after") == "7"
        assert ends.header("connection") == "close"
        assert ends.code == ("overloaded" if status == 503 else "queue_full")
    page = service.metrics.text().decode()
    assert f'rorqual_http_responses_total{{status="{status}"}} 1.0' in page


def test_a_route_that_fails_is_in_flight_no_more(service: Service) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        assert service.num_in_flight == (scope["method"] == "POST")
        raise ZeroDivisionError

    for method in ("POST", "GET"):
        with pytest.raises(ZeroDivisionError):
            limited(service, scope(method=method), app=fail)
        assert service.num_in_flight == 0


def test_a_bodys_time_runs_from_its_beginning(service: Service) -> None:
    """A client that sends a byte now and then does not get new time with each."""
    ends = Ends([b"a", b"b", b"c"])

    async def test() -> None:
        loop = asyncio.get_running_loop()
        clock = loop.time
        exchange = _Exchange(ends.receive, ends.send, service)
        exchange.limit_body(Headers(), 100, seconds=30)
        assert (await exchange.receive())["body"] == b"a"
        loop.time = lambda: clock() + 29  # type: ignore[method-assign]
        assert (await exchange.receive())["body"] == b"b"
        loop.time = lambda: clock() + 31  # type: ignore[method-assign]
        assert (await exchange.receive())["type"] == "http.disconnect"
        assert (ends.status, ends.code) == (408, "slow_body")
        await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
        assert len(ends.sent) == 2

    asyncio.run(test())


def test_a_whole_body_has_no_deadline_any_more(service: Service) -> None:
    """While an answer runs only the client's leaving is waited for, however long."""
    ends = Ends([b"a"])

    async def test() -> None:
        loop = asyncio.get_running_loop()
        clock = loop.time
        exchange = _Exchange(ends.receive, ends.send, service)
        exchange.limit_body(Headers(), 100, seconds=30)
        assert (await exchange.receive())["body"] == b"a"
        loop.time = lambda: clock() + 31  # type: ignore[method-assign]
        assert (await exchange.receive())["type"] == "http.disconnect"
        assert ends.sent == []

    asyncio.run(test())


def test_an_answer_that_has_begun_is_not_answered_again(service: Service) -> None:
    ends = Ends([b"a", b"b" * 9])

    async def test() -> None:
        exchange = _Exchange(ends.receive, ends.send, service)
        exchange.limit_body(Headers(), 5, seconds=30)
        await exchange.receive()
        await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await exchange.receive())["type"] == "http.disconnect"
        assert [message["type"] for message in ends.sent] == ["http.response.start"]

    asyncio.run(test())


def test_no_client_has_all_requests_in_flight(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(max_concurrent_requests=16)
    service = Service(FakeEngine(tokenizer), make_model(tokenizer), settings)
    service.is_started = True
    statuses = []
    for owner, num_taken in (("a", 12), ("b", 3), ("c", 1), ("d", 0)):
        asked = scope(method="POST") | {"state": {"owner": owner}}
        while (status := limited(service, asked).status) == 200:
            service.note_in_flight(1, owner)
        assert service.in_flight[owner] == num_taken
        statuses.append(status)
    assert statuses == [429] * 4


@pytest.mark.parametrize(
    ("content", "num"),
    [
        (b'{"a": [1, 2, 3], "b": "x"}', 5),
        (b'{"a": ",,,::\\"::,", "b,:\\\\": 1}', 3),
        (b'[1, "never ends, no, no', 1),
    ],
)
def test_values_are_counted_outside_of_texts(content: bytes, num: int) -> None:
    check_values(content, num)
    with pytest.raises(ApiError, match=f"has {num} values"):
        check_values(content, num - 1)


def test_a_clients_large_bodies_follow_each_other_at_a_distance() -> None:
    pacer = Pacer()
    text, values = b"x" * int(BYTES_A_SECOND), b"," * int(VALUES_A_SECOND)
    own = VALUES_A_SECOND / BYTES_A_SECOND  # the values are bytes too
    assert pacer.wait_seconds("a", text, 10.0) == 0
    assert pacer.wait_seconds("b", values, 10.25) == 0, "others need not wait"
    assert pacer.wait_seconds("a", text, 10.25) == pytest.approx(0.75)
    assert pacer.wait_seconds("a", b"", 10.5) == pytest.approx(1.5)
    assert pacer.wait_seconds("b", b"", 11.0) == pytest.approx(0.25 + own)
    assert pacer.wait_seconds("a", text, 12.5) == 0, "what is over counts no more"
    assert pacer.wait_seconds("a", b"", 12.5) == 1


def test_a_body_waits_for_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, slept = [], []

    def wait(self: Pacer, owner: str, content: bytes, now: float) -> float:
        asked.append((owner, content))
        return 12.0

    async def note(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(Pacer, "wait_seconds", wait)
    monkeypatch.setattr(asyncio, "sleep", note)
    asyncio.run(Pacer().turn("a", b"{ "))
    assert (asked, slept) == ([("a", b"{ ")], [12.0])


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "messages"])
def test_every_body_takes_its_turn(
    route: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def turn(self: Pacer, owner: str, content: bytes) -> None:
        asked.append((owner, content))

    monkeypatch.setattr(Pacer, "turn", turn)
    with running(create_app(FakeEngine(tokenizer), make_model(tokenizer))) as live:
        httpx.post(f"{live.url}/v1/{route}", content=b"{ ")
    assert asked == [("address 127.0.0.1", b"{ ")]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (b"multipart/form-data; boundary=x", 200),
        (b"Multipart/Form-Data", 200),
        (b"application/x-www-form-urlencoded", 422),
        (b"application/json", 422),
        (b"multipart/mixed", 422),
        (None, 422),
    ],
)
def test_only_forms_of_parts_are_read_as_uploads(
    tokenizer: Tokenizer, kind: bytes | None, status: int
) -> None:
    """64 MB of `&` are a form too, whose parser takes half a minute, byte by byte."""
    service = Service(FakeEngine(tokenizer), make_model(tokenizer), ServerSettings())
    service.is_started = True
    headers = [] if kind is None else [(b"content-type", kind)]
    for path in ("/v1/files", "/v1/files/"):
        asked = scope(method="POST") | {"path": path, "headers": headers}
        assert limited(service, asked).status == status
