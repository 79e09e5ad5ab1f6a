"""Where one request ends and the next begins, as strictly as RFC 9112 allows.

h11 reads the requests. What it forgives is refused here before it looks: a proxy in front may read
such a request in another way, and then a client's body becomes another client's request. Refused
are lines that end without CR, lines that are folded, control characters, a length beside chunks,
more than one length, and a Host that is none. A target of the form `http://host/path` is rewritten
(§3.2.2: its host counts).
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import h11

HEAD_BYTES = 64 * 1024
"""Of a request's line and headers."""
HEAD_LINES = 256
"""As many headers as 64 KiB hold take a fifth of a second, in which nobody is answered."""
MANY_CHUNKS, CHUNK_BYTES = 1000, 64
"""A body of more chunks than that must have `CHUNK_BYTES` in each, on average: h11 takes as long
for one byte as for many.
"""
HEAD_END = re.compile(rb"\n\r?\n")  # where h11 ends it
BEGINNING = re.compile(rb"[\x21-\x7e]")
LINE = rb"[\x21-\x7e][\t\x20-\x7e\x80-\xff]*\r\n"
HEAD = re.compile(rb"(?:" + LINE + rb")+\r\n")
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
LENGTH = re.compile(rb"content-length[ \t]*+:(.*)\r\n", re.IGNORECASE)
DIGITS = re.compile(rb"[0-9]{1,18}")
HOST = re.compile(
    rb"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::(?P<port>[0-9]{0,5}))?"
)
MAX_PORT = 65535


class Framing(h11.Connection):
    """A server's side of one connection; `problem` is why its requests came to an end."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.problem: h11.RemoteProtocolError | None = None
        self._num_searched = 0
        self._num_chunks = self._num_chunk_bytes = 0  # of the body that comes

    @property
    def has_begun(self) -> bool:
        """Whether some of the next request is here."""
        return bool(self.trailing_data[0])

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            if self.their_state is h11.IDLE and not self._has_head():
                return h11.NEED_DATA
            event = super().next_event()
            if isinstance(event, h11.Data):
                self._count(event)
            return self._begun(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as problem:
            self.problem = problem
            raise

    def _begun(self, request: h11.Request) -> h11.Request:
        self._num_chunks = self._num_chunk_bytes = 0
        return _checked(request)

    def _count(self, data: h11.Data) -> None:
        self._num_chunks += data.chunk_end  # before, not all of its bytes are here
        self._num_chunk_bytes += len(data.data)
        least = self._num_chunks * CHUNK_BYTES
        if self._num_chunks > MANY_CHUNKS and self._num_chunk_bytes < least:
            raise _refused(f"more than {MANY_CHUNKS} chunks of less than {CHUNK_BYTES} bytes")

    def _has_head(self) -> bool:
        """Whether the next request's line and headers are here; looks at them before h11 does."""
        data = self.trailing_data[0]
        empty = EMPTY_LINES.match(data)
        assert empty is not None, "the pattern matches every text"
        if empty.end():  # §2.2: some clients end a body with an empty line
            data = data[empty.end() :]
            self._receive_buffer.maybe_extract_at_most(empty.end())
        end = HEAD_END.search(data, max(0, self._num_searched - 2))
        self._num_searched = len(data) if end is None else 0
        if (len(data) if end is None else end.end()) > HEAD_BYTES:
            raise _refused(f"the headers are longer than {HEAD_BYTES} bytes", 431)
        if end is None:
            if data and data != b"\r" and not BEGINNING.match(data):  # TLS, mostly
                raise _refused("this is no HTTP")
            return False
        head = data[: end.end()]
        if head.count(b"\n") > HEAD_LINES:
            raise _refused(f"the headers have more than {HEAD_LINES} lines", 431)
        if not HEAD.fullmatch(head):
            raise _refused("a line of the headers is malformed")
        _check_lengths(head)
        return True


def host_name(host: str) -> str | None:
    """The name in a Host header, in small letters; None if it is no `name` or `name:port`."""
    match = HOST.fullmatch(host.encode("latin-1", "replace"))
    if match is None or int(match["port"] or 0) > MAX_PORT:
        return None
    return match["name"].decode("ascii").lower()


def _check_lengths(head: bytes) -> None:
    lines = head.split(b"\n")[1:]
    found = (LENGTH.fullmatch(line + b"\n") for line in lines)
    lengths = [match[1].strip(b" \t") for match in found if match]
    if len(lengths) > 1:
        raise _refused("more than one Content-Length")
    if lengths and not DIGITS.fullmatch(lengths[0]):
        raise _refused("Content-Length is no number of at most 18 digits")
    if lengths and any(line.lower().startswith(b"transfer-encoding") for line in lines):
        raise _refused("Content-Length beside Transfer-Encoding")


def _checked(request: h11.Request) -> h11.Request:
    if not request.http_version.startswith(b"1."):
        raise _refused("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
    target, hosts = request.target, [value for name, value in request.headers if name == b"host"]
    if not target.startswith(b"/"):
        target, hosts = _parts(request, hosts)
    if any(host_name(host.decode("latin-1")) is None for host in hosts):
        raise _refused("Host is no name, or name:port")
    if target is request.target:
        return request
    others = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=target,
        headers=[*((b"host", host) for host in hosts), *others],
        http_version=request.http_version,
    )


def _parts(request: h11.Request, hosts: list[bytes]) -> tuple[bytes, list[bytes]]:
    """(target, Host) of a target that is no path."""
    target = request.target
    if (request.method, target) == (b"OPTIONS", b"*") or request.method == b"CONNECT":
        return target, hosts
    try:
        url = urlsplit(target.decode("ascii"))
    except ValueError:
        raise _refused("the target is no URL") from None
    if url.scheme not in ("http", "https") or not url.netloc:
        raise _refused("the target is neither a path nor a URL")
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    return path.encode(), [url.netloc.encode()]


def _refused(reason: str, status: int = 400) -> h11.RemoteProtocolError:
    return h11.RemoteProtocolError(reason, error_status_hint=status)
