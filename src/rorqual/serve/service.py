"""What all routes share: the engine, the model, the settings, the metrics, the draining flag."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from rorqual.engine import (
    ClientOverloaded,
    CompiledGrammar,
    EngineFailed,
    EngineOverloaded,
    Grammar,
    Request,
)
from rorqual.errors import RorqualError
from rorqual.log import logger
from rorqual.serve.answers import Answers, EngineFace
from rorqual.serve.bodies import MemoryKeeper, Pacer
from rorqual.serve.errors import (
    ApiError,
    describe,
    engine_failed,
    overloaded,
    queue_full,
    unknown_error,
)
from rorqual.serve.fair_pool import Caller, FairPool
from rorqual.serve.metrics import EndReason, Metrics
from rorqual.serve.notes import Notes
from rorqual.serve.schemas_common import INVALID_GRAMMAR, Body
from rorqual.serve.settings import ServedModel, ServerSettings

log = logger("serve")
T = TypeVar("T")
POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 2.0
"""For the 503 of those whose answers a drain could not wait for."""
LONG_CHARS = 64 * 1024
"""Of a text: longer ones have a thread of their own, so that short ones need not wait for them."""
NOBODY = Caller()
MAX_NAMED_FIELDS = 1000
"""Fields without effect that the log names, each once."""


class Service:
    """One served model. `app.state.service` is it."""

    def __init__(self, engine: EngineFace, model: ServedModel, settings: ServerSettings) -> None:
        self.engine, self.model, self.settings = engine, model, settings
        self.metrics = Metrics(engine.stats)
        self.is_started = False
        self.is_draining = False
        self.in_flight: Counter[str] = Counter()  # by owner
        self._named_fields: set[str] = set()
        self.memory, self.pacer = MemoryKeeper(), Pacer()
        self._texts = FairPool("texts", num_threads=2, max_waiting=256)
        self._long_texts = FairPool("long-texts", num_threads=1, max_waiting=64)
        self._grammars = FairPool("grammars", num_threads=2, max_waiting=64)

    @property
    def num_in_flight(self) -> int:
        return self.in_flight.total()

    def note_in_flight(self, change: int, owner: str = "") -> None:
        """Counts requests that have begun and those that have their whole response."""
        self.in_flight[owner] += change
        if not self.in_flight[owner]:
            del self.in_flight[owner]
        self.metrics.note_in_flight(self.num_in_flight)

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served."""
        if name is not None and name not in self.model.names:
            served = " and ".join(map(repr, self.model.names))
            message = f"the model {name[:100]!r} is not served; there is {served}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def check_body(self, body: Body) -> None:
        """404 for a model that is not served; with strict fields 422 for one that nobody knows."""
        self.check_model(body.model)
        if self.settings.has_strict_fields and body.notes.unknown:
            raise unknown_error(body.notes.unknown)
        self.log_ignored(body.notes)

    def log_ignored(self, notes: Notes) -> None:
        """Names the fields without effect that no request has had before."""
        new = set(notes.ignored) - self._named_fields
        if new and len(self._named_fields) < MAX_NAMED_FIELDS:
            self._named_fields |= new
            log.info("requests have fields without effect: %s", ", ".join(sorted(new)))

    async def aside(
        self, work: Callable[[], T], param: str, caller: Caller = NOBODY, num_chars: int = 0
    ) -> T:
        """Runs tokenising and the like off the event loop; its RorqualError becomes a 400."""
        pool = self._texts if num_chars <= LONG_CHARS else self._long_texts
        return await self._in_pool(pool, work, param, caller, "invalid_prompt")

    async def compile(
        self, grammar: Grammar | None, caller: Caller, param: str
    ) -> CompiledGrammar | None:
        """What the engine needs of a grammar; 400 for one that cannot be used or is too large."""
        if grammar is None:
            return None
        try:
            known = self.engine.known_grammar(grammar)
        except RorqualError as problem:
            raise ApiError.of(problem, param, code=INVALID_GRAMMAR) from None
        if known is not None:
            return known
        work = partial(self.engine.compile, grammar)
        return await self._in_pool(self._grammars, work, param, caller, INVALID_GRAMMAR)

    async def _in_pool(
        self, pool: FairPool, work: Callable[[], T], param: str, caller: Caller, code: str
    ) -> T:
        try:
            return await pool.run(caller, work)
        except EngineOverloaded:
            raise queue_full(self.settings.retry_after_seconds) from None
        except RorqualError as problem:
            raise ApiError.of(problem, param, code=code) from None

    def close(self) -> None:
        for pool in (self._texts, self._long_texts, self._grammars):
            pool.close()

    async def drain(self, batches: Coroutine[object, object, None]) -> bool:
        """Waits until the engine, the batches and the responses have finished; False: too late."""
        limit = self.settings.drain_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                await batches
                while self.num_in_flight:  # also those that are on their way to the engine
                    await asyncio.sleep(POLL_SECONDS)
                if await self.engine.drain(limit):
                    return True
        except TimeoutError:
            pass
        await self.engine.close()  # those whose answers are not complete are told so
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                while self.num_in_flight:
                    await asyncio.sleep(POLL_SECONDS)
        return False

    def answers(self, requests: Sequence[Request], clock: asyncio.Timeout | None = None) -> Answers:
        """`clock` is the time limit around them, if there is one. ApiError 422 for more answers
        than there is ever room for.
        """
        if len(requests) > (most := self.engine.most_at_once(requests[0])):
            text = f"n: {len(requests)} answers at once; this server gives a client at most {most}"
            raise ApiError(422, text, code="invalid_value", param="n")

        def end_reason() -> EndReason:
            if clock is not None and clock.expired():
                return "failed"
            return "closed" if self.is_draining else "cancelled"

        return Answers(self.engine, requests, self.metrics, end_reason)

    def api_error(self, problem: BaseException) -> ApiError | None:
        """What a client is told of an error that came out of the engine; None for a bug."""
        if isinstance(problem, ApiError):
            return problem
        if isinstance(problem, EngineFailed):
            return engine_failed(problem)
        if isinstance(problem, EngineOverloaded):
            if self.is_draining:
                return overloaded("the server is shutting down")
            is_own = isinstance(problem, ClientOverloaded)
            return queue_full(self.settings.retry_after_seconds, is_own=is_own)
        if isinstance(problem, RorqualError):
            return ApiError(400, describe(problem), code="invalid_request")
        return None
