"""Sending an answer: whole or as events, with signs of life while it waits.

A reply begins with its first piece, so that errors before it still have their status. When nothing
comes for `keep_alive_seconds` it begins anyway: a stream with a comment, a whole reply with an
empty line (white space before JSON), as DeepSeek's service does; an error after that is an error
event, or an error body under status 200. A client that leaves, or reads nothing for
`stall_seconds`, has its answers cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rorqual.engine import Piece, Request
from rorqual.log import logger
from rorqual.serve.answers import ClientGoneError
from rorqual.serve.bodies import until_gone
from rorqual.serve.errors import INTERNAL, ApiError, too_slow
from rorqual.serve.notes import Notes
from rorqual.serve.reply_text import LINE_ENDS
from rorqual.serve.service import Service

log = logger("serve")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Assembler(Protocol):
    """Turns the pieces of a request's answers into JSON texts."""

    def put(self, index: int, piece: Piece) -> Iterable[str]:
        """The stream's chunks for this piece; remembers it for `whole`."""
        ...

    def last(self) -> Iterable[str]:
        """Chunks after all answers have ended."""
        ...

    def whole(self) -> str:
        """The unstreamed reply."""
        ...


def event(text: str) -> bytes:
    """One server-sent event. JSON escapes line breaks, but not those that only Unicode knows: a
    client that splits text by Python's rules would break there.
    """
    return b"data: " + text.translate(LINE_ENDS).encode() + b"\n\n"


def named_event(text: str) -> bytes:
    """An event whose name is its JSON's first member, `type`."""
    _, _, rest = text.partition(': "')
    return b"event: " + rest.partition('"')[0].encode() + b"\n" + event(text)


async def _nothing_to_do() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How an API sends its answers; the chat route's way is the default."""

    frame: Callable[[str], bytes] = event
    keep_alive: bytes = KEEP_ALIVE
    end: bytes = DONE
    fail: Callable[[ApiError], Iterable[str]] = lambda error: [error.body()]
    """What is said of an error once the reply has begun: the last events, or the body."""
    before_end: Callable[[], Awaitable[None]] = _nothing_to_do
    """Runs when all pieces have come, before the client learns that the answer is whole."""


class AnswerResponse(Response):
    """An ASGI response that runs the requests while it is sent."""

    def __init__(
        self,
        service: Service,
        requests: Sequence[Request],
        assembler: Assembler,
        *,
        is_stream: bool,
        wire: Wire | None = None,
        notes: Notes | None = None,
    ) -> None:
        super().__init__(None, 200)
        self._service, self._requests, self._assembler = service, requests, assembler
        self._is_stream, self._wire, self._notes = is_stream, wire or Wire(), notes or Notes()
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                self._service.metrics.note_disconnect()
        finally:
            writer.cancel()
            watcher.cancel()
            await asyncio.wait({writer, watcher})
        if not writer.cancelled():
            writer.result()  # raises what it raised

    async def _write(self, send: Send) -> None:
        limit = self._service.settings.request_timeout_seconds
        try:
            async with asyncio.timeout(limit) as clock:
                await self._run(send, clock)
        except TimeoutError:
            assert limit is not None, "nothing else here runs out of time"
            await self._fail(send, too_slow(limit))
        except ClientGoneError:
            self._service.metrics.note_disconnect()
        except Exception as problem:  # the boundary: whatever it is, the client is told
            error = self._service.api_error(problem)
            if error is None and not self._has_begun:
                raise
            if error is not None and error.status == 400 and error.param is None:
                error.param = self._param_at_fault()
            if error is None:
                log.error("an answer failed", exc_info=problem)
                error = ApiError(500, INTERNAL, code="internal_error")
            await self._fail(send, error)

    def _param_at_fault(self) -> str | None:
        """What the engine can still refuse after all other checks is a grammar."""
        has_grammar = any(request.params.grammar is not None for request in self._requests)
        return "response_format" if has_grammar else None

    async def _run(self, send: Send, clock: asyncio.Timeout) -> None:
        tick = self._service.settings.keep_alive_seconds
        async with self._service.answers(self._requests, clock) as answers:
            while (events := await answers.next(tick)) != []:
                if events is None:
                    await self._send(send, self._wire.keep_alive if self._is_stream else b"\n")
                    continue
                chunks = [c for index, piece in events for c in self._assembler.put(index, piece)]
                if self._is_stream and chunks:
                    await self._send(send, self._framed(chunks))
        await self._wire.before_end()
        if self._is_stream:
            last = self._framed(self._assembler.last())
            await self._send(send, last + self._wire.end, is_end=True)
        else:
            await self._send(send, self._assembler.whole().encode(), is_end=True)

    def _framed(self, texts: Iterable[str]) -> bytes:
        return b"".join(map(self._wire.frame, texts))

    async def _fail(self, send: Send, error: ApiError) -> None:
        """Before the first byte an error response of its own; after it, what can still be said."""
        if not self._has_begun:
            raise error
        texts = self._wire.fail(error)
        body = self._framed(texts) if self._is_stream else "".join(texts).encode()
        try:
            await self._send(send, body, is_end=True)
        except ClientGoneError:
            self._service.metrics.note_disconnect()

    async def _send(self, send: Send, body: bytes, *, is_end: bool = False) -> None:
        try:
            async with asyncio.timeout(self._service.settings.stall_seconds) as stall:
                if not self._has_begun:
                    self._has_begun = True
                    await send(self._start(len(body) if is_end else None))
                await send({"type": "http.response.body", "body": body, "more_body": not is_end})
        except TimeoutError:
            if stall.expired():
                raise ClientGoneError from None
            raise

    def _start(self, content_length: int | None) -> dict[str, object]:
        kind = b"text/event-stream; charset=utf-8" if self._is_stream else b"application/json"
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache")]
        headers += [(n.encode(), text.encode()) for n, text in self._notes.headers().items()]
        if self._is_stream:
            headers.append((b"x-accel-buffering", b"no"))  # nginx passes events on at once
        if content_length is not None and not self._is_stream:
            headers.append((b"content-length", str(content_length).encode()))
        return {"type": "http.response.start", "status": 200, "headers": headers}


async def collect(service: Service, requests: Sequence[Request], assembler: Assembler) -> str:
    """The unstreamed reply without a client to send it to: for batches.

    Its limit of time begins with its first piece: what runs in the background waits for the others.
    """
    limit = service.settings.request_timeout_seconds
    clock = asyncio.timeout(None)
    try:
        async with clock, service.answers(requests, clock) as answers:
            while events := await answers.next(None):
                if clock.when() is None and limit is not None:
                    clock.reschedule(asyncio.get_running_loop().time() + limit)
                for index, piece in events:
                    for _ in assembler.put(index, piece):
                        pass
    except TimeoutError:
        if limit is None or not clock.expired():
            raise
        raise too_slow(limit) from None
    return assembler.whole()
