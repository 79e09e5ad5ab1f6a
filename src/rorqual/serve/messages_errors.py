"""Errors of Anthropic's routes in Anthropic's shape, whoever raises them, and `request-id`, that of
`request_ids.py`.

Its clients know 400 for every request that is at fault, so 422 becomes that. Other statuses stay.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.serve.errors import ENGINE_FAILED, INTERNAL, ApiError

PREFIXES = ("", "/anthropic")
"""Of `/v1/messages`; DeepSeek's base address for Anthropic's clients ends in the second."""
PATHS = ("/v1/messages", "/anthropic")
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_texts(error: ApiError) -> list[str]:
    """The event that ends a stream, or the body of a reply that has begun."""
    return [_body(error.status, error.message, error.code, None)]


def _body(status: int, message: str, code: str | None, request_id: str | None) -> str:
    fault = "invalid_request_error" if status < 500 else "api_error"
    kind = "api_error" if code == ENGINE_FAILED else TYPES.get(status, fault)
    body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message}}
    if request_id is not None:
        body["request_id"] = request_id
    return json.dumps(body)


def _is_anthropics(scope: Scope) -> bool:
    """Of the models' route, which both APIs have, their clients' header tells whose it is."""
    path = scope["path"]
    has_version = any(name == b"anthropic-version" for name, _ in scope["headers"])
    is_listing = path == "/v1/models" or path.startswith("/v1/models/")
    return path.startswith(PATHS) or (is_listing and has_version)


class MessagesErrors:
    """ASGI middleware around the guards."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_anthropics(scope):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(send, scope["request_id"])
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:
            # The application's own answer would come from outside of this middleware.
            if not exchange.has_begun:
                await exchange.send_error(500, INTERNAL, None, [])
            raise


class _Exchange:
    """One response: an error's is held until its body is whole, and written anew."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._held: Message | None = None
        self._body = b""
        self.has_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            if message["status"] >= 400:
                self._held = message
                return
            message = {**message, "headers": [*message["headers"], self._header()]}
        elif self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._rewrite(self._held)
            return
        await self._send(message)

    async def send_error(self, status: int, text: str, code: str | None, headers: Any) -> None:
        body = _body(status, text, code, self._request_id).encode()
        kept = [pair for pair in headers if pair[0] not in (b"content-length", b"content-type")]
        length = (b"content-length", str(len(body)).encode())
        kept += [(b"content-type", b"application/json"), length, self._header()]
        await self._send({"type": "http.response.start", "status": status, "headers": kept})
        await self._send({"type": "http.response.body", "body": body})

    def _header(self) -> tuple[bytes, bytes]:
        return b"request-id", self._request_id.encode()

    async def _rewrite(self, held: Message) -> None:
        error = json.loads(self._body)["error"]
        status = 400 if held["status"] == 422 else held["status"]
        await self.send_error(status, error["message"], error["code"], held["headers"])
