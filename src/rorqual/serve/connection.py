"""One client's connection: uvicorn's protocol over h11, and what it leaves open.

Its requests are framed by `Framing`. A client that has sent all and closes its half of the
connection still gets its answers: uvicorn counts it as gone. Headers have a limit of time, as have
clients that do not read; the connections a limit of number. A connection that must end although its
client may still be sending is closed in two steps (RFC 9112 §9.6), else the client may lose what it
was told.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from rorqual.serve.errors import ApiError, overloaded
from rorqual.serve.framing import Framing
from rorqual.serve.reply_text import new_id
from rorqual.serve.request_ids import HEADER
from rorqual.serve.settings import ServerSettings

PEER_SECONDS = 0.25
"""Between two looks whether a client that has closed its half is gone altogether."""
LINGER_SECONDS = 2.0
"""How long what a client still sends is thrown away after the last answer."""


class Connection(H11Protocol):
    """A protocol for `uvicorn.Config`, with the server's settings."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        settings: ServerSettings,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: Framing = Framing()
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._peer_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._waits_since = self.loop.time()
        self._has_eof = self._is_lingering = False

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_new(self) -> bool:
        """Whether it waits for its first request."""
        return self.cycle is None and not self._is_lingering and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = _ClosesInSteps(transport, self)  # type: ignore[assignment]
        if len(self.connections) > self._settings.max_connections and not self._make_room():
            seconds = self._settings.retry_after_seconds
            self._refuse(overloaded("too many connections are open", seconds))
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._peer_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        # What comes after a last request is nobody's (§9.6).
        is_over = self.conn.their_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)
        if not self._is_lingering and not is_over:
            super().data_received(data)
            self._watch_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the connection open for what is owed to the client."""
        self._has_eof = True
        if self._is_lingering or self.is_idle or self.cycle.more_body:
            return False
        if not self.cycle.response_started and self.cycle.scope["http_version"] != "1.0":
            # Closed by half or altogether look the same. Whoever is gone answers this with a reset.
            event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(event))
        self._watch_peer()
        return True

    def pause_writing(self) -> None:
        """More is unread than the system takes: whoever reads none of it is given up."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def on_response_complete(self) -> None:
        self._waits_since = self.loop.time()
        super().on_response_complete()  # begins the next request, if it is here
        if self._has_eof and self.is_idle:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        problem = self.conn.problem
        assert problem is not None, "only Framing's errors come here"
        self._refuse(ApiError(problem.error_status_hint, str(problem), code="malformed_request"))

    def shutdown(self) -> None:
        if self._is_lingering:
            self.transport.abort()
        else:
            super().shutdown()

    def close_in_steps(self, transport: asyncio.Transport) -> None:
        """Closes, but not before a client that is still sending has had time to read."""
        is_sending = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.conn.has_begun
        if self._has_eof or not is_sending:
            transport.close()
        elif not self._is_lingering and not transport.is_closing():
            self._is_lingering = True
            self.flow.resume_reading()
            transport.write_eof()
            self._peer_timer = self.loop.call_later(LINGER_SECONDS, transport.abort)

    def _refuse(self, error: ApiError) -> None:
        """An answer to what is no request, and the end."""
        if not self.is_idle:
            self.cycle.disconnected = True  # its body was malformed: the route gives up
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error.headers |= {"connection": "close", HEADER: new_id("req_")}
            response = error.response()
            event = h11.Response(
                status_code=error.status,
                headers=response.raw_headers,
                reason=STATUS_PHRASES[error.status],
            )
            for part in (event, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part))
        self.transport.close()

    def _make_room(self) -> bool:
        """Ends the connection that has waited longest for a request; False if none does."""
        idle = [other for other in self.connections if isinstance(other, Connection)]
        idle = [other for other in idle if other is not self and other.is_idle]
        if not idle:
            return False
        min(idle, key=lambda other: other._waits_since).transport.abort()
        return True

    def _watch_head(self) -> None:
        if not self.is_idle:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            seconds = self._settings.head_timeout_seconds
            self._head_timer = self.loop.call_later(seconds, self._note_late_head)

    def _note_late_head(self) -> None:
        self._head_timer = None
        if not self.is_idle or self._is_lingering:
            return
        if self.conn.has_begun:
            seconds = self._settings.head_timeout_seconds
            text = f"the headers took longer than {seconds:g} s"
            self._refuse(ApiError(408, text, code="slow_headers"))
        else:
            self.transport.close()

    def _watch_reader(self) -> None:
        def look() -> None:
            if self.transport.get_write_buffer_size() < num_unread:
                self._watch_reader()
            else:
                self.transport.abort()

        num_unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self._settings.stall_seconds, look)

    def _watch_peer(self) -> None:
        if self.is_idle:
            return
        opened = self.transport.get_extra_info("socket")
        if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._peer_timer = self.loop.call_later(PEER_SECONDS, self._watch_peer)


class _ClosesInSteps:
    """A transport whose `close` is the connection's."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._connection.close_in_steps(self._transport)
