"""A name for every request, in `x-request-id`: OpenAI's clients show it, and whoever reports a
fault can give it. A client's own is told back.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.serve.reply_text import new_id

HEADER = "x-request-id"
OWN = re.compile(rb"[\x21-\x7e]{1,128}")
"""A client's own, if it is short and plain."""


class RequestIds:
    """ASGI middleware around all others; the id is `scope["request_id"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((text for name, text in scope["headers"] if name == HEADER.encode()), b"")
        request_id = given.decode() if OWN.fullmatch(given) else new_id("req_")
        scope["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                pair = (HEADER.encode(), request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), pair]}
            await send(message)

        await self._app(scope, receive, send_named)
