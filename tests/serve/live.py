"""A real server on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI
from openai import OpenAI

from patience import HANG_SECONDS, wait_until
from rorqual.serve.server import Server, address_of, open_socket


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
        wait_until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive(), "the server did not end"

    def advance(self, seconds: float) -> None:
        """Moves the loop's clock: what is due within that time happens now."""
        clock = self.loop.time

        async def move() -> None:
            self.loop.time = lambda: clock() + seconds  # type: ignore[method-assign]

        asyncio.run_coroutine_threadsafe(move(), self.loop).result(HANG_SECONDS)

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self.server._loop is not None, "started"
        return self.server._loop


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


def client_of(live: Live, key: str = "none") -> OpenAI:
    return OpenAI(base_url=live.url + "/v1", api_key=key, max_retries=0, timeout=HANG_SECONDS)
