"""Bytes over a socket, as no client library would send them."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from patience import HANG_SECONDS

STATUS = re.compile(rb"HTTP/1\.1 (\d{3})[^\r\n]*\r\n")


@dataclass(frozen=True)
class Heard:
    """All that came until the server closed."""

    data: bytes

    @property
    def statuses(self) -> list[int]:
        """Of the responses, and of interim ones."""
        return [int(status) for status in STATUS.findall(self.data)]

    @property
    def finals(self) -> list[int]:
        return [status for status in self.statuses if status >= 200]


class Wire:
    """A connection to the server at `url`."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        assert place.hostname is not None
        assert place.port is not None
        self.socket = socket.create_connection((place.hostname, place.port), HANG_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each send by itself

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def close_half(self) -> Wire:
        self.socket.shutdown(socket.SHUT_WR)
        return self

    def close(self) -> None:
        self.socket.close()

    def read_until(self, wanted: bytes) -> bytes:
        data = b""
        while wanted not in data:
            part = self.socket.recv(65536)
            assert part, f"closed before {wanted!r}: {data!r}"
            data += part
        return data

    def hear(self) -> Heard:
        """Everything until the server closes; fails if it never does."""
        data = b""
        with self.socket:
            while part := self.socket.recv(65536):
                data += part
        return Heard(data)


def talk(url: str, data: bytes) -> Heard:
    return Wire(url).send(data).hear()
