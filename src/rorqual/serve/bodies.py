"""What a body may hold, before it is parsed; and memory that large ones took, given back.

Parsing and validating hold Python's lock, in whatever thread they run: a text of 4 MB takes 20 ms,
as many bytes of small values a second or two, in which nobody is answered. So values are counted
first, and one client's large bodies follow each other at a distance.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import re
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from rorqual.serve.errors import MAX_SHOWN_CHARACTERS, ApiError
from rorqual.serve.fair_pool import owner_of

MAX_VALUES = 100_000
"""Commas and colons outside of texts; more where the model's context has room for more ids."""
BYTES_A_SECOND, VALUES_A_SECOND = 20e6, 300e3
"""Of one client's bodies, on average: about a fifth of what one core can read."""
LARGE_BYTES = 1 << 20
TRIM_SECONDS = 1.0
# A text without an end reaches to the body's end: looked for again at each of its quotes it took
# hours. Possessive, so that nothing is tried twice.
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_SUSPECT = re.compile(rb"NaN|Infinity|[0-9][eE]\+?[0-9]{3}|(?<![0-9])[0-9]{200}|\\u[dD][89a-fA-F]")
"""What may be a number without end or half a surrogate pair: it is looked for before parsing.
199 digits and an exponent of two make less than 1e298, and floats end at 1.8e308.
"""
_HALF = re.compile("[\ud800-\udfff]")


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
                check_values(content, max(MAX_VALUES, 2 * service.model.max_positions))
                if _SUSPECT.search(content):
                    with suppress(ValueError, RecursionError):  # who reads it next says why
                        check_repeatable(await request.json())
            return await handle(request)

        return check_and_handle


def check_values(content: bytes, most: int) -> None:
    """ApiError 413 for a body of more than so many values, 400 for one that is not UTF-8."""
    if b"\0" in content:  # no JSON has it; Python would read UTF-16, where values cannot be counted
        text = "the body is not valid JSON: it has a zero byte, as UTF-16 has; send UTF-8"
        raise ApiError(400, text, code="invalid_json")
    if num_marks(content) > most and (num := num_marks(_TEXTS.sub(b"", content))) > most:
        message = f"the body has {num} values; this server parses at most {most}"
        raise ApiError(413, message, code="too_many_values")


def check_repeatable(body: object) -> None:
    """ApiError 422 for numbers and texts that are none in JSON, though Python reads them so."""
    levels: list[tuple[str, object]] = [("", body)]
    while levels:
        place, value = levels.pop()
        inner: Iterable[tuple[str | int, object]]
        inner = value.items() if isinstance(value, dict) else enumerate(_items(value))
        for key, item in inner:
            if isinstance(item, dict | list):
                levels.append((_inside(place, key), item))
            elif (fault := _fault_of(item)) or (fault := _fault_of(key)):
                where = _inside(place, key)
                message = f"{where[:MAX_SHOWN_CHARACTERS]}: {fault}"
                raise ApiError(422, message, code="invalid_value", param=where)


def _items(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else [value]


def _inside(place: str, key: str | int) -> str:
    return f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".removeprefix(".")


def _fault_of(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "is no finite number"
    if isinstance(value, str) and _HALF.search(value):
        return "holds half of a surrogate pair, which is no text"
    return None


def num_marks(content: bytes) -> int:
    return content.count(b",") + content.count(b":")


class Pacer:
    """Lets a body wait for its client's earlier ones; the first need not."""

    def __init__(self) -> None:
        self._free_at: dict[str, float] = {}

    async def turn(self, owner: str, content: bytes) -> None:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(self.wait_seconds(owner, content, now))

    def wait_seconds(self, owner: str, content: bytes, now: float) -> float:
        """Also takes the time that this body is worth."""
        self._free_at = {who: time for who, time in self._free_at.items() if time > now}
        start = self._free_at.get(owner, now)
        worth = len(content) / BYTES_A_SECOND + num_marks(content) / VALUES_A_SECOND
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
