"""What a body may hold, before it is parsed; and memory that large ones took, given back.

Parsing and validating hold Python's lock, in whatever thread they run: a text of 4 MB takes 20 ms,
as many bytes of small values a second or two, in which nobody is answered. So values are counted
first, and one client's large bodies follow each other at a distance.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from rorqual.serve.errors import ApiError
from rorqual.serve.fair_pool import owner_of
from rorqual.serve.json_values import check_repeatable, check_values, is_suspect, num_marks

BYTES_A_SECOND, VALUES_A_SECOND = 20e6, 300e3
"""Of one client's bodies, on average: about a fifth of what one core can read."""
LARGE_BYTES = 1 << 20
TRIM_SECONDS = 1.0


class BodyRoute(APIRoute):
    """A route that counts what is in a body before anybody parses it, and refuses values that no
    reply could repeat.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            if request.method == "POST":
                service = request.app.state.service
                try:
                    content = await request.body()
                except ClientDisconnect:
                    return ApiError(400, "the client left within its body").response()
                await service.pacer.turn(owner_of(request.scope), content)
                check_values(content, service.model.max_values)
                if is_suspect(content):
                    with suppress(ValueError, RecursionError):  # who reads it next says why
                        check_repeatable(await request.json())
                return await _unless_left(handle(request), request)
            return await handle(request)

        return check_and_handle


async def _unless_left(handling: Coroutine[Any, Any, Response], request: Request) -> Response:
    """What the route answers; of a client that leaves meanwhile nothing waits any more."""
    handler = asyncio.create_task(handling)
    watcher = asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait({handler, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        has_left = not handler.done()
        handler.cancel()
        watcher.cancel()
        await asyncio.wait({handler, watcher})
    if has_left:
        request.app.state.service.metrics.note_disconnect()
        return ApiError(400, "the client left before its answer began").response()
    return handler.result()


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left, of which the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Pacer:
    """Lets a body wait for its client's earlier ones; the first need not."""

    def __init__(self) -> None:
        self._free_at: dict[str, float] = {}

    async def turn(self, owner: str, content: bytes) -> None:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(self.wait_seconds(owner, content, now))

    async def spend(self, owner: str, num_bytes: int, num_values: int) -> None:
        """The same for what is as large."""
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(self._wait_seconds(owner, num_bytes, num_values, now))

    def wait_seconds(self, owner: str, content: bytes, now: float) -> float:
        """Also takes the time that this body is worth."""
        return self._wait_seconds(owner, len(content), num_marks(content), now)

    def _wait_seconds(self, owner: str, num_bytes: int, num_values: int, now: float) -> float:
        self._free_at = {who: time for who, time in self._free_at.items() if time > now}
        start = self._free_at.get(owner, now)
        worth = num_bytes / BYTES_A_SECOND + num_values / VALUES_A_SECOND
        self._free_at[owner] = start + worth
        return start - now


class MemoryKeeper:
    """Gives back what large bodies took: glibc keeps freed memory to itself unless it is asked."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def note_large(self) -> None:
        """Soon after the last large body, in a thread."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(TRIM_SECONDS, loop.run_in_executor, None, give_memory_back)


def give_memory_back() -> None:
    """Nothing where the system has another allocator."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
