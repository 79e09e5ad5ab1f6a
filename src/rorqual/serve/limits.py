"""What one client can take from the others: body size, time to send it, requests at once.

Also the gate that closes while the server drains: running requests finish, new ones get a 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.engine import FREE_PLACES_FACTOR
from rorqual.serve.bodies import LARGE_BYTES
from rorqual.serve.errors import ApiError, overloaded, queue_full
from rorqual.serve.fair_pool import owner_of
from rorqual.serve.service import Service

FILES_PATH = "/v1/files"
STORED_PATHS = ("/v1/responses/", "/responses/")
MULTIPART_BYTES = 64 * 1024
"""What a form adds to the file in it."""


class LimitGuard:
    """ASGI middleware around all routes; counts every response."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service
        exchange = _Exchange(receive, send, service)
        problem = self._refusal(scope) if _is_counted(scope) else None
        if problem is not None:
            await problem.response()(scope, receive, exchange.send)
            return
        settings = service.settings
        is_upload = scope["path"].rstrip("/") == FILES_PATH
        limit = settings.max_file_bytes + MULTIPART_BYTES if is_upload else settings.max_body_bytes
        exchange.limit_body(Headers(scope=scope), limit, settings.body_timeout_seconds)
        if not _is_counted(scope):
            await self._app(scope, exchange.receive, exchange.send)
            return
        owner = owner_of(scope)
        service.note_in_flight(+1, owner)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            service.note_in_flight(-1, owner)
            if exchange.num_bytes > LARGE_BYTES:
                service.memory.note_large()

    def _refusal(self, scope: Scope) -> ApiError | None:
        service = self._service
        is_post = scope["method"] == "POST"
        if is_post and (service.is_draining or not service.is_started):
            state = "shutting down" if service.is_draining else "starting"
            return overloaded(f"the server is {state}", service.settings.retry_after_seconds)
        num_own = service.in_flight[owner_of(scope)]
        num_free = service.settings.max_concurrent_requests - service.num_in_flight
        if num_own >= FREE_PLACES_FACTOR * num_free:
            error = queue_full(service.settings.retry_after_seconds, is_own=True)
            error.headers["connection"] = "close"  # its body is not read
            return error
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if scope["path"].rstrip("/") == FILES_PATH and kind != "multipart/form-data":
            # Another kind of form is read byte by byte: 64 MB of them take half a minute.
            text = "file: is sent as multipart/form-data"
            headers = {"connection": "close"}
            return ApiError(422, text, code="invalid_value", param="file", headers=headers)
        return None


def _is_counted(scope: Scope) -> bool:
    """What may cost much: all that has a body, and what reads a stored response."""
    return scope["method"] == "POST" or scope["path"].startswith(STORED_PATHS)


class _Exchange:
    """One request's messages, watched on their way.

    A body that is too long or too slow is answered here at once, whatever the route makes of it.
    """

    def __init__(self, receive: Receive, send: Send, service: Service) -> None:
        self._receive, self._send, self._service = receive, send, service
        self._is_refused = self._has_begun = self._has_body = False
        self.num_bytes, self._max_bytes = 0, 0
        self._deadline = 0.0
        self._seconds = 0.0

    def limit_body(self, headers: Headers, max_bytes: int, seconds: float) -> None:
        self._max_bytes, self._seconds = max_bytes, seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 19 and int(length) > max_bytes:
            self.num_bytes = int(length)  # refused at the first read, before any of it is taken

    async def receive(self) -> Message:
        if self._is_refused:
            return {"type": "http.disconnect"}
        if self._has_body:  # nothing but the client's leaving is left to come
            return await self._receive()
        if self.num_bytes > self._max_bytes:
            return await self._refuse(self._too_long())
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the body took longer than {self._seconds:g} s"
            return await self._refuse(ApiError(408, text, code="slow_body"))
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self._has_body = not message.get("more_body", False)
            if self.num_bytes > self._max_bytes:
                return await self._refuse(self._too_long())
        return message

    async def send(self, message: Message) -> None:
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._service.metrics.note_response(message["status"])
            if self._service.is_draining:  # else its next request may find the connection closed
                message = {**message, "headers": _closing(message.get("headers", []))}
        await self._send(message)

    def _too_long(self) -> ApiError:
        text = f"the body is longer than this server's limit of {self._max_bytes} bytes"
        return ApiError(413, text, code="body_too_large")

    async def _refuse(self, error: ApiError) -> Message:
        if not self._has_begun:
            error.headers["connection"] = "close"  # the rest of the body is not read
            response = error.response()
            headers = response.raw_headers
            start = {"type": "http.response.start", "status": error.status, "headers": headers}
            await self.send(start)
            await self.send({"type": "http.response.body", "body": bytes(response.body)})
        self._is_refused = True
        return {"type": "http.disconnect"}


def _closing(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Response headers that also tell the client to use another connection next time."""
    kept = [(name, value) for name, value in headers if name.lower() != b"connection"]
    return [*kept, (b"connection", b"close")]
