"""The running answers of one HTTP request, merged in the order their pieces come.

Each answer has a task that takes its pieces from the engine at once, whatever the client does:
a slow client only makes the queue here longer (`max_tokens` bounds it). Leaving the context
cancels what still runs, and that frees its blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Protocol

from rorqual.engine import (
    AnswerClosed,
    CompiledGrammar,
    EngineFailed,
    EngineStats,
    Grammar,
    Piece,
    Request,
)
from rorqual.errors import RorqualError
from rorqual.serve.metrics import EndReason, Metrics

Event = tuple[int, Piece]


class PieceStream(Protocol):
    """What AsyncEngine.submit returns."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    async def __anext__(self) -> Piece: ...

    async def aclose(self) -> None: ...


class EngineFace(Protocol):
    """What the server asks of AsyncEngine; tests have a deterministic one."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def drain(self, timeout_seconds: float) -> bool: ...

    def submit(self, request: Request) -> PieceStream: ...

    def most_at_once(self, request: Request) -> int: ...

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """May take seconds: not for the loop's thread."""
        ...

    def known_grammar(self, grammar: Grammar) -> CompiledGrammar | None:
        """One that was compiled before, at once."""
        ...

    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> EngineFailed | None:
        """Why it can answer nothing any more, if so."""
        ...


class ClientGoneError(Exception):
    """The client left, or reads nothing any more."""


class Answers:
    """`async with Answers(...) as answers`, then `answers.next` until it returns an empty list.

    `end_reason` says how answers end that are cancelled from outside.
    """

    def __init__(
        self,
        engine: EngineFace,
        requests: Sequence[Request],
        metrics: Metrics,
        end_reason: Callable[[], EndReason] = lambda: "cancelled",
    ) -> None:
        self._engine, self._requests, self._metrics = engine, requests, metrics
        self._end_reason = end_reason
        self._queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_open = len(requests)
        self._problem: BaseException | None = None

    async def __aenter__(self) -> Answers:
        for index, request in enumerate(self._requests):
            task = asyncio.create_task(self._pump(index, request))
            task.add_done_callback(self._note_end)
            self._tasks.append(task)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        fault = self._problem or problem
        if isinstance(fault, Exception) and not isinstance(fault, ClientGoneError):
            reason = _reason_of(fault)  # one failed: the others go with it
            self._end_reason = lambda: reason
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def next(self, timeout_seconds: float | None) -> list[Event] | None:
        """All pieces that have come, at least one; None if none came in that time; [] at the end.

        Raises what an answer raised, after the pieces that came before it.
        """
        if self._problem is not None:
            raise self._problem
        events: list[Event] = []
        while self._num_open and not events:
            try:
                async with asyncio.timeout(timeout_seconds):
                    item = await self._queue.get()
            except TimeoutError:
                return None
            self._take(item, events)
            while not self._queue.empty() and self._problem is None:
                self._take(self._queue.get_nowait(), events)
            if self._problem is not None and not events:
                raise self._problem
        return events

    def _take(self, item: Event | BaseException | None, events: list[Event]) -> None:
        if item is None:
            self._num_open -= 1
        elif isinstance(item, BaseException):
            self._problem = item
        else:
            events.append(item)

    async def _pump(self, index: int, request: Request) -> None:
        since = time.perf_counter()
        is_first = True
        finish_reason: EndReason | None = None
        try:
            async with aclosing(self._engine.submit(request)) as pieces:
                async for piece in pieces:
                    now = time.perf_counter()
                    self._metrics.note_piece(now - since, len(piece.token_ids), is_first)
                    since, is_first, finish_reason = now, False, piece.finish_reason
                    self._queue.put_nowait((index, piece))
            if finish_reason is None:
                text = "the server is shutting down; the answer is not complete"
                raise AnswerClosed(text)
        except asyncio.CancelledError:
            finish_reason = finish_reason or self._end_reason()
            raise
        except Exception as problem:
            finish_reason = _reason_of(problem)
            raise
        finally:
            self._metrics.note_end(finish_reason or "failed")

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._queue.put_nowait(task.exception())  # None: it ended well


def _reason_of(problem: BaseException) -> EndReason:
    if isinstance(problem, AnswerClosed):
        return "closed"
    is_refusal = isinstance(problem, RorqualError) and not isinstance(problem, EngineFailed)
    return "refused" if is_refusal else "failed"
