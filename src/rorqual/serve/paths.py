"""A route's path with a slash at its end is the route's: clients put base addresses together in
either way, and few of them follow a redirect with their body.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class SlashTrimmer:
    """ASGI middleware around all others, so that each of them sees one path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)
