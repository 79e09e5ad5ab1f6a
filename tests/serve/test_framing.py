"""Where requests begin and end on the wire.

The oracle is RFC 9112 (and 9110 for Host), section by section. Every case goes on with a second
request, `GET /health` with `Connection: close`: a refused request is answered alone, so that
nothing behind it, which might be its body, is taken for a request.
"""

from __future__ import annotations

import json
from contextlib import suppress

import h11
import pytest
from fake_engine import FakeEngine
from live import Live
from raw import Wire, talk

from rorqual.serve.framing import (
    CHUNK_BYTES,
    HEAD_BYTES,
    HEAD_LINES,
    MANY_CHUNKS,
    Framing,
    host_name,
)

pytestmark = pytest.mark.concurrency

HOST = b"Host: 127.0.0.1\r\n"
SECOND = b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
BODY = b'{"prompt": "x"}'
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def post(headers: bytes, body: bytes) -> bytes:
    start = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST
    return start + headers + b"\r\n" + body + SECOND


def get(headers: bytes, *, target: bytes = b"/health", version: bytes = b"1.1") -> bytes:
    return b"GET " + target + b" HTTP/" + version + b"\r\n" + headers + b"\r\n" + SECOND


def length(number: bytes) -> bytes:
    return b"Content-Length: " + number + b"\r\n"


def chunks(size: bytes, *, end: bytes = b"\r\n") -> bytes:
    return size + b"\r\n" + BODY + end + b"0\r\n\r\n"


BYTES = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY.ljust(MANY_CHUNKS)) + b"0\r\n\r\n"
REFUSED = {
    # RFC 9112 §6.1, §6.3: lengths
    "a length, then chunks": (post(length(b"4") + CHUNKED, b"0\r\n\r\n"), 400),
    "chunks, then a length": (post(CHUNKED + length(b"4"), b"0\r\n\r\n"), 400),
    "lengths that differ": (post(length(b"15") + length(b"16"), BODY), 400),
    "a length twice": (post(length(b"15") + length(b"15"), BODY), 400),
    "a list of lengths": (post(length(b"15, 15"), BODY), 400),
    "19 digits": (post(length(b"9999999999999999999"), BODY), 400),
    "20 digits": (post(length(b"18446744073709551631"), BODY), 400),
    "20 digits that say 15": (post(length(b"00000000000000000015"), BODY), 400),
    "5,000 digits": (post(length(b"1" * 5000), BODY), 400),
    "a negative length": (post(length(b"-15"), BODY), 400),
    "a sign": (post(length(b"+15"), BODY), 400),
    "hexadecimal": (post(length(b"0xf"), BODY), 400),
    "an underscore": (post(length(b"1_5"), BODY), 400),
    "no digit": (post(length(b""), b""), 400),
    "another script's digits": (post(length("١٥".encode()), BODY), 400),
    "a coding that is not known": (post(b"Transfer-Encoding: gzip, chunked\r\n", b""), 501),
    "identity": (post(b"Transfer-Encoding: identity\r\n", b""), 501),
    "chunked twice": (post(CHUNKED + CHUNKED, b"0\r\n\r\n"), 501),
    "a coding after a control": (post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"), 400),
    # §7.1: chunks
    "a long chunk size": (post(CHUNKED, chunks(b"0" * 30 + b"f")), 400),
    "no hexadecimal size": (post(CHUNKED, chunks(b"0xf")), 400),
    "a negative size": (post(CHUNKED, chunks(b"-f")), 400),
    "a chunk without its end": (post(CHUNKED, chunks(b"f", end=b"xx")), 400),
    "a chunk that is longer": (post(CHUNKED, chunks(b"e")), 400),
    "chunks with bare LF": (post(CHUNKED, b"f\n" + BODY + b"\n0\n\n"), 400),
    "more chunks of a byte": (post(CHUNKED, b"1\r\n \r\n" + BYTES), 400),
    "LF in an extension": (post(CHUNKED, chunks(b"f;\na")), 400),
    # §5: header fields
    "a space before the colon": (get(HOST + b"X-A : b\r\n"), 400),
    "a length with a space before the colon": (post(b"Content-Length : 15\r\n", BODY), 400),
    "a folded line": (get(HOST + b"X-A: b\r\n c\r\n"), 400),
    "a folded first line": (get(b" X-A: b\r\n" + HOST), 400),
    "a line without a colon": (get(HOST + b"X-A\r\n"), 400),
    "bare LF": (b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n" + SECOND, 400),
    "one bare LF": (get(HOST + b"X-A: b\nX-B: c\r\n"), 400),
    "a bare LF at the end": (b"GET /health HTTP/1.1\r\n" + HOST + b"\n" + SECOND, 400),
    "a bare CR": (get(HOST + b"X-A: b\rX-B: c\r\n"), 400),
    "NUL": (get(HOST + b"X-A: b\0c\r\n"), 400),
    "a control character": (get(HOST + b"X-A: b\x01c\r\n"), 400),
    # RFC 9112 §3.2, RFC 9110 §7.2: Host
    "no Host": (get(b""), 400),
    "two Hosts": (get(HOST + HOST), 400),
    "two different Hosts": (get(HOST + b"Host: evil.example\r\n"), 400),
    "a Host with a user": (get(b"Host: evil@127.0.0.1\r\n"), 400),
    "a Host with a password": (get(b"Host: a:b@127.0.0.1\r\n"), 400),
    "a Host with a path": (get(b"Host: 127.0.0.1/x\r\n"), 400),
    "a Host with a space": (get(b"Host: 127.0.0.1 evil\r\n"), 400),
    "a Host with a large port": (get(b"Host: 127.0.0.1:65536\r\n"), 400),
    "a Host whose port is no number": (get(b"Host: 127.0.0.1:http\r\n"), 400),
    "a Host with an open bracket": (get(b"Host: [::1\r\n"), 400),
    "a Host that is two": (get(b"Host: 127.0.0.1, evil.example\r\n"), 400),
    # §3: the first line
    "a target with a user": (get(HOST, target=b"http://evil@127.0.0.1/health"), 400),
    "a target of another scheme": (get(HOST, target=b"ftp://127.0.0.1/health"), 400),
    "a target without a slash": (get(HOST, target=b"health"), 400),
    "a target in brackets": (get(HOST, target=b"http://[/health"), 400),
    "two spaces": (b"GET  /health HTTP/1.1\r\n" + HOST + b"\r\n" + SECOND, 400),
    "a target beyond ASCII": (get(HOST, target="/é".encode()), 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/2": (get(HOST, version=b"2.0"), 505),
    "TLS": (b"\x16\x03\x01\x00\x05hello", 400),
    # §2.2: lengths
    "a line that is too long": (get(HOST + b"X-A: " + b"a" * HEAD_BYTES + b"\r\n"), 431),
    "too many lines": (get(HOST + b"X-A: b\r\n" * 10_000), 431),
    "too many lines that are short": (get(HOST + b"a:\r\n" * HEAD_LINES), 431),
    "a target that is too long": (get(HOST, target=b"/" + b"a" * HEAD_BYTES), 431),
}  # fmt: skip
LEFT = HEAD_BYTES - (len(get(HOST + b"X-A: \r\n")) - len(SECOND))
TAKEN = {
    "a length": post(length(b"15"), BODY),
    "18 digits": post(length(b"000000000000000015"), BODY),
    "chunks": post(CHUNKED, chunks(b"f")),
    "chunks in capitals": post(b"TRANSFER-ENCODING: Chunked\r\n", chunks(b"F")),
    "a thousand chunks of a byte": post(CHUNKED, BYTES),
    "a chunk with an extension": post(CHUNKED, chunks(b'f;a="b;c";d')),
    "a trailer": post(CHUNKED, b"f\r\n" + BODY + b"\r\n0\r\nX-A: b\r\n\r\n"),
    "no space after the colon": get(b"Host:127.0.0.1\r\n"),
    "spaces around a value": get(b"Host: \t 127.0.0.1 \t \r\nX-A:\r\n"),
    "bytes beyond ASCII in a value": get(HOST + "X-A: é\r\n".encode()),
    "a whole URL": get(b"Host: evil.example\r\n", target=b"http://127.0.0.1/health"),
    "a whole URL in capitals": get(HOST, target=b"HTTP://LOCALHOST:8000/health?a=b"),
    "HTTP/1.2": get(HOST, version=b"1.2"),
    "an empty line before": b"\r\n\r\n" + get(HOST),
    "an empty line behind a body": post(length(b"15"), BODY + b"\r\n"),
    "an upgrade": get(HOST + b"Connection: upgrade\r\nUpgrade: h2c\r\n"),
    "as many lines as may be": get(HOST + b"a:\r\n" * (HEAD_LINES - 3)),
    "just as long as may be": get(HOST + b"X-A: " + b"a" * LEFT + b"\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_malformed_ends_the_connection(live: Live, engine: FakeEngine, name: str) -> None:
    data, status = REFUSED[name]
    before = len(engine.requests)
    heard = talk(live.url, data)
    assert heard.finals == [status]
    head, _, body = heard.data.rpartition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["message"]
    assert len(engine.requests) == before


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_well_formed_is_answered(live: Live, name: str) -> None:
    assert talk(live.url, TAKEN[name]).finals == [200, 200]


@pytest.mark.parametrize("name", [name for name in TAKEN if len(TAKEN[name]) < HEAD_BYTES])
def test_it_does_not_matter_how_the_bytes_arrive(live: Live, name: str) -> None:
    wire = Wire(live.url)
    for place in range(len(TAKEN[name])):
        wire.send(TAKEN[name][place : place + 1])
    assert wire.hear().finals == [200, 200]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_request_behind_the_last_one_is_not_answered(live: Live, version: bytes) -> None:
    """HTTP/1.0 closes after an answer, whatever it asks for; so does `Connection: close`."""
    for headers in (b"Connection: close\r\n", b"Connection: keep-alive\r\n", b""):
        if version == b"1.1" and b"close" not in headers:
            continue
        assert talk(live.url, get(HOST + headers, version=version)).finals == [200]


def test_requests_in_a_row_are_answered_in_order(live: Live, engine: FakeEngine) -> None:
    prompts = ["first", "second", "third"]
    bodies = [json.dumps({"prompt": prompt, "echo": True}).encode() for prompt in prompts]
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST
    data = b"".join(head + length(b"%d" % len(body)) + b"\r\n" + body for body in bodies)
    heard = talk(live.url, data + SECOND)
    assert heard.finals == [200] * 4
    places = [heard.data.find(prompt.encode()) for prompt in prompts]
    assert places == sorted(places)
    assert -1 not in places


def test_a_client_that_waits_is_told_to_go_on(live: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST
    wire = Wire(live.url)
    wire.send(head + b"Expect: 100-continue\r\nConnection: close\r\n" + length(b"15") + b"\r\n")
    assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
    assert wire.send(BODY).hear().finals == [200]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"), ("LocalHost:80", "localhost"), ("127.0.0.1:", "127.0.0.1"),
        ("[::1]:8000", "[::1]"), ("", ""), ("a:65535", "a"), ("a:65536", None), ("a:-1", None),
        ("a@b", None), ("a/b", None), ("a b", None), ("[::1", None), ("::1", None), ("a:1:2", None),
        ("é", None), ("a\\b", None), ("a#b", None), ("a?b", None), ("[a@b]", None),
    ],
)  # fmt: skip
def test_the_name_in_a_host(host: str, name: str | None) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize("num_bytes", [3, 64, 67, 70, 71, 1000, 1448, 65536, 10**6])
def test_chunks_are_counted_alike_however_they_are_cut(num_bytes: int) -> None:
    """A socket delivers what it has. Chunks of 64 bytes pass; of 63, the first of too many does
    not.
    """
    size = CHUNK_BYTES
    whole, less = (
        (b"%x\r\n" % n + b"a" * n + b"\r\n") * (MANY_CHUNKS + 200) for n in (size, size - 1)
    )
    assert taken(whole, num_bytes) == (MANY_CHUNKS + 200) * size
    assert taken(less, num_bytes) == MANY_CHUNKS * (size - 1)


def taken(body: bytes, num_bytes: int) -> int:
    """Bytes of the chunks before the one that is refused, if one is."""
    framing = Framing()
    framing.receive_data(b"POST / HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n")
    assert isinstance(framing.next_event(), h11.Request)
    num_taken = num_now = 0
    for at in range(0, len(body), num_bytes):
        framing.receive_data(body[at : at + num_bytes])
        with suppress(h11.RemoteProtocolError):
            while (event := framing.next_event()) is not h11.NEED_DATA:
                assert isinstance(event, h11.Data)
                num_now += len(event.data)
                num_taken = num_now if event.chunk_end else num_taken
        if framing.problem is not None:
            assert f"more than {MANY_CHUNKS} chunks" in str(framing.problem)
            break
    return num_taken
