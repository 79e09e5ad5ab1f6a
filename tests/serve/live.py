"""A real server on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from rorqual.serve.server import Server, address_of, open_socket

START_SECONDS = 30


class Live:
    """`url` is the base address; `call` runs something on the server's event loop."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.notices: list[str] = []
        self.server = Server(app, self.notices.append)
        self._socket = open_socket("127.0.0.1", 0)
        self.url = address_of(self._socket)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self.server.started, START_SECONDS)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive(), "the server did not end"

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self.server._loop is not None, "started"
        return self.server._loop


def wait_until(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Polls until `is_true()`; fails after that time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def running(app: FastAPI) -> Iterator[Live]:
    """The server while the block runs."""
    live = Live(app)
    live.start()
    try:
        yield live
    finally:
        if not live.has_ended:
            live.stop()
