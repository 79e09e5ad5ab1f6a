"""uvicorn around the application, with an orderly end.

The first SIGTERM, SIGINT or SIGHUP (the terminal was closed) drains: the socket stays open, so that
new requests get a 503 they can read, running ones finish (at most `drain_timeout_seconds`), and the
process ends; who is connected by then has `last_call_seconds` to ask and be refused. A second
SIGTERM or SIGINT ends it at once.

If the engine fails for good, health checks and requests are told so for `failed_seconds`; then the
server ends, and `failure` says why, for whoever started it to start it anew.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rorqual.errors import EngineFailed, UsageError
from rorqual.serve.app import drain
from rorqual.serve.connection import Connection
from rorqual.serve.settings import ServerSettings

EXIT_AT_ONCE = 1
EXIT_FAILED = 1
ACCEPT_TURNS = 4
"""Of the loop, until a connection that the system holds for us is one of ours."""
POLL_SECONDS = 0.02
SPARE_FILES = 128
"""Open files beside the clients' connections and theirs: weights, the database, the loop's own."""
FILES_A_CONNECTION = 2
"""Itself, and a file that is sent or received by it."""
BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded: a port in use shows at once. UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as problem:
        raise UsageError(
            f"cannot listen there: {problem}",
            where=f"{host}:{port}",
            fix="choose another --port (0 takes a free one) or --host",
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    """http://host:port as a browser takes it."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    host = str(bound.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def connections_within_limits(wanted: int) -> int:
    """As many connections as the process may have open files; raises its limit where it may."""
    try:
        import resource
    except ImportError:  # not POSIX: no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    need = FILES_A_CONNECTION * wanted + SPARE_FILES
    most = need if hard == resource.RLIM_INFINITY else min(hard, need)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, min(wanted, (max(soft, most) - SPARE_FILES) // FILES_A_CONNECTION))


class Server(uvicorn.Server):
    """uvicorn's server, but a signal drains."""

    def __init__(self, app: FastAPI, on_notice: Callable[[str], None] = lambda text: None) -> None:
        settings: ServerSettings = app.state.service.settings
        most = connections_within_limits(settings.max_connections)
        settings = replace(settings, max_connections=most)
        config = uvicorn.Config(
            app,
            http=partial(Connection, settings=settings),  # type: ignore[arg-type]  # it is called
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,  # no access log: paths and addresses are private
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]  # a delay
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._app, self._on_notice = app, on_notice
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: EngineFailed | None = None
        self.has_hung_up = False
        """Whether it ends because its terminal was closed."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second."""
        if self.failure is None:
            self.failure = self._app.state.service.engine.failure
            if self.failure is not None:
                self._on_notice(f"{self.failure}\nThe server ends now.")
                seconds = self._app.state.service.settings.failed_seconds
                asyncio.get_running_loop().call_later(seconds, self._end)
        return await super().on_tick(counter)

    def _end(self) -> None:
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Also SIGHUP, unless it is ignored, as `nohup` has it."""
        number = getattr(signal, "SIGHUP", None)  # Windows has none
        is_main = threading.current_thread() is threading.main_thread()
        with super().capture_signals():
            if number is None or not is_main or signal.getsignal(number) == signal.SIG_IGN:
                yield
                return
            before = signal.signal(number, self._hang_up)
            try:
                yield
            finally:
                signal.signal(number, before)

    def _hang_up(self, sig: int, frame: FrameType | None) -> None:
        """The terminal was closed. System and shell may both send the signal: it counts once."""
        if not self.has_hung_up and not self.is_draining:
            self.has_hung_up = True
            self.handle_exit(sig, frame)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs in the main thread between two instructions: it only asks the loop to act."""
        if self._loop is None or not self.started:
            self.should_exit = True
        elif self.is_draining:
            self.end_at_once()
        else:
            self._app.state.service.is_draining = True
            self._loop.call_soon_threadsafe(self.begin_drain)

    @property
    def is_draining(self) -> bool:
        return bool(self._app.state.service.is_draining)

    def begin_drain(self) -> None:
        """From the loop's own thread."""
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._end_well())

    def end_at_once(self) -> None:
        """Tells no client; only removes a temporary folder first."""
        self._app.state.store.remove_temporary()
        os._exit(EXIT_AT_ONCE)

    async def _end_well(self) -> None:
        num_running = self._app.state.service.num_in_flight
        self._say(
            f"Finishing {num_running} requests; no new ones are taken. Ctrl-C again ends at once."
        )
        if await drain(self._app):
            await self._hear_newcomers()
        else:
            self._say("Some requests did not finish in time and were cancelled.")
            self.config.timeout_graceful_shutdown = 0
        self.should_exit = True

    def _say(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is closed must not end the drain
            self._on_notice(text)

    async def _hear_newcomers(self) -> None:
        """Connections that have not asked yet get a reply before the server closes."""
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._app.state.service.settings.last_call_seconds):
                while any(getattr(each, "is_new", False) for each in self.server_state.connections):
                    await asyncio.sleep(POLL_SECONDS)
