"""The engine behind an asyncio loop: one thread runs the steps, tasks take the pieces.

The thread owns the engine. Requests and cancellations reach it through a queue between two steps;
what a step gave goes back to the loop in one call. Neither side ever waits for the other: pieces
lie in a queue per answer, which `max_tokens` bounds, so a slow reader stalls nobody.

A step that fails ends the answers that ran, and the engine goes on. It gives up, `failure` says so,
and nothing is taken any more, when step after step fails, when blocks were lost, or when the thread
itself ends: then a new process has to help.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from rorqual.engine.answer import Answer
from rorqual.engine.engine import Engine
from rorqual.engine.grammar import CompiledGrammar, Grammar
from rorqual.engine.grammar_trial import GrammarTrial
from rorqual.engine.request import Piece, Request
from rorqual.engine.stats import EngineStats
from rorqual.errors import AnswerClosed, ClientOverloaded, EngineFailed, EngineOverloaded
from rorqual.log import logger

POLL_SECONDS = 0.02
MAX_FAILED_STEPS = 3
"""In a row. One may be one request's fault; this many are the engine's."""

FREE_PLACES_FACTOR = 3
"""An owner may have this many times the free places: alone three quarters of all. However many
others have come, a newcomer finds one.
"""

Item = Piece | BaseException


@dataclass(frozen=True, eq=False)
class _Update:
    """New weights, and who waits for their version."""

    tensors: Mapping[str, Tensor]
    version: Future[int] = field(default_factory=Future)

    def run(self, engine: Engine) -> None:
        """Replaces the weights, unless nobody waits for it any more."""
        if not self.version.set_running_or_notify_cancel():
            return
        try:
            self.version.set_result(engine.update(self.tensors))
        except Exception as problem:  # noqa: BLE001  it belongs to whoever waits
            self.version.set_exception(problem)

    def refuse(self, problem: Exception) -> None:
        if self.version.set_running_or_notify_cancel():
            self.version.set_exception(problem)


# The number of an answer: begin it, or (None) cancel it.
Command = tuple[int, Request | None] | _Update


@dataclass(frozen=True, eq=False)
class _Open:
    """An answer that is not over: who asked, and the pieces that wait for its reader."""

    request: Request
    inbox: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)


class AnswerStream:
    """`async for piece in stream`: the pieces of one answer, until it ends.

    Giving up one `anext` (a timeout, for keep-alives) loses nothing. `aclose` cancels the answer,
    as does forgetting the stream; `contextlib.aclosing` does it at the right time.
    """

    def __init__(self, owner: AsyncEngine, number: int, inbox: asyncio.Queue[Item]) -> None:
        self._owner, self._number, self._inbox = owner, number, inbox
        self._is_over = False

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._is_over:
            raise StopAsyncIteration
        item = await self._inbox.get()
        if isinstance(item, BaseException):
            self._is_over = True
            raise item
        self._is_over = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Cancels the answer if it is not over."""
        self._is_over = True
        self._owner.cancel(self._number)

    def __del__(self) -> None:
        self._owner.cancel(self._number)


class AsyncEngine:
    """At most `engine.max_batch + max_queue` answers are open at a time; more are refused.

    A named owner may have `FREE_PLACES_FACTOR` times as many as there are free places, so that none
    takes all; of what runs in the background as many as there are free places.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256) -> None:
        self._engine = engine
        self._max_open = engine.max_batch + max_queue
        engine.grammars.trial = GrammarTrial(engine.tokenizer)
        self._numbers = count()
        self._open: dict[int, _Open] = {}
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_taking = False
        self.failure: EngineFailed | None = None

    async def start(self) -> None:
        """Begins to run steps, for the loop of the caller; warms up beside it."""
        assert self._thread is None, "the engine was started before"
        loop = asyncio.get_running_loop()
        worker = _Worker(self._engine, self._commands, loop, self._deliver, self._fail)
        self._thread = threading.Thread(target=worker.run, name="rorqual-engine", daemon=True)
        self._thread.start()
        warm_up = self._engine.grammars.warm_up
        threading.Thread(target=warm_up, name="rorqual-warm-up", daemon=True).start()
        self._is_taking = True

    async def drain(self, timeout_seconds: float) -> bool:
        """Takes no new requests and waits for the running ones; whether all came to their end."""
        self._is_taking = False
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._open:
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stops; answers that are not done end with AnswerClosed."""
        self._is_taking = False
        if self._thread is not None:
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)
            self._refuse_updates()
        trial, self._engine.grammars.trial = self._engine.grammars.trial, None
        if trial is not None:
            await asyncio.to_thread(trial.close)
        problem = AnswerClosed("the engine was closed before the answer was complete")
        self._deliver([(number, problem) for number in list(self._open)])

    def submit(self, request: Request) -> AnswerStream:
        """Queues a request. UsageError if its prompt cannot be answered, EngineOverloaded if too
        many are open or none is taken, EngineFailed if there is no engine any more; what else is
        wrong with it comes out of the stream.
        """
        self._check_taking("requests")
        self._check_place(request)
        self._engine.check_prompt(request.prompt_ids)
        number = next(self._numbers)
        entry = self._open[number] = _Open(request)
        self._commands.put((number, request))
        return AnswerStream(self, number, entry.inbox)

    def cancel(self, number: int) -> None:
        """Ends an answer that is not done. Any thread may call it."""
        if self._open.pop(number, None) is not None:
            self._commands.put((number, None))

    async def update(self, tensors: Mapping[str, Tensor]) -> int:
        """`Engine.update` between two steps: answers that run go on with the new weights. The new
        version; UsageError, with nothing changed, for what are not this model's weights.

        Any loop of any thread may await it; whoever gives up before its turn has come changes
        nothing. The tensors must stay as they are until then.
        """
        self._check_taking("new weights")
        update = _Update(tensors)
        self._commands.put(update)
        if self.failure is not None or not self._is_taking:  # meanwhile: nobody may be there
            self._refuse_updates()
        return await asyncio.wrap_future(update.version)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar for `Request.compiled`, tried out by another process before this one takes it:
        it may take seconds, so it is not for the loop's thread. UsageError for one that cannot be
        used or is too large.
        """
        return self._engine.grammars.compile(grammar)

    def known_grammar(self, grammar: Grammar) -> CompiledGrammar | None:
        """At once: one that was compiled, or None. UsageError as `compile` had it."""
        return self._engine.grammars.known(grammar)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def most_at_once(self, request: Request) -> int:
        """How many answers of this kind a client can have while nobody else has any."""
        if not request.owner:
            return self._max_open
        factor = 1 if request.is_background else FREE_PLACES_FACTOR
        return -(-factor * self._max_open // (factor + 1))

    def _check_taking(self, what: str) -> None:
        if self.failure is not None:
            raise self.failure
        if not self._is_taking:
            raise EngineOverloaded(f"the engine takes no {what} now")

    def _refuse_updates(self) -> None:
        """Those that no thread will do any more, since it has ended."""
        if self._thread is not None and self._thread.is_alive() and self.failure is None:
            return
        with suppress(Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Update):
                    command.refuse(self.failure or AnswerClosed("the engine was closed"))

    def _check_place(self, request: Request) -> None:
        entries = list(self._open.values())  # another thread may cancel one meanwhile
        num_free = self._max_open - len(entries)
        if num_free <= 0:
            raise EngineOverloaded("too many requests", found=f"{len(entries)} are open")
        factor = 1 if request.is_background else FREE_PLACES_FACTOR
        if request.owner:
            kin = [e for e in entries if e.request.owner == request.owner]
            num_own = sum(e.request.is_background == request.is_background for e in kin)
            if num_own >= factor * num_free:
                raise ClientOverloaded(
                    "too many requests of one client", found=f"{num_own} are open, {num_free} free"
                )

    def _deliver(self, items: list[tuple[int, Item]]) -> None:
        """Runs in the loop, once a step."""
        for number, item in items:
            entry = self._open.get(number)
            if entry is None:
                continue  # it was cancelled
            entry.inbox.put_nowait(item)
            if isinstance(item, BaseException) or item.finish_reason is not None:
                self._open.pop(number, None)  # another thread may have cancelled it just now

    def _fail(self, failure: EngineFailed) -> None:
        """Runs in the loop, at the end of a thread that was not asked to end."""
        self.failure, self._is_taking = failure, False
        self._refuse_updates()
        self._deliver([(number, failure) for number in list(self._open)])


class _Worker:
    """The thread's side: it alone touches the engine."""

    def __init__(
        self,
        engine: Engine,
        commands: SimpleQueue[Command | None],
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[tuple[int, Item]]], None],
        fail: Callable[[EngineFailed], None],
    ) -> None:
        self._engine, self._commands = engine, commands
        self._loop, self._deliver, self._fail = loop, deliver, fail
        self._num_failed_steps = 0
        self._answers: dict[int, Answer] = {}
        self._numbers: dict[Answer, int] = {}

    def run(self) -> None:
        """Until a None is among the commands, or the engine cannot go on."""
        try:
            while self._obey():
                if self._engine.has_work:
                    self._step()
            self._end_all()
        except BaseException as problem:  # noqa: BLE001  whoever waits must not wait for ever
            logger(__name__).critical("the engine gives up", exc_info=problem)
            failure = problem if isinstance(problem, EngineFailed) else _failure(problem)
            self._tell(self._fail, failure)

    def _obey(self) -> bool:
        """Takes all commands there are, waiting for one if nothing runs; False for the last."""
        while not (self._engine.has_work and self._commands.empty()):
            command = self._commands.get()
            if command is None:
                return False
            if isinstance(command, _Update):
                command.run(self._engine)
                continue
            number, request = command
            if request is not None:
                self._add(number, request)
            elif (answer := self._answers.get(number)) is not None:
                self._forget(answer)
        return True

    def _add(self, number: int, request: Request) -> None:
        try:
            answer = self._engine.add(request)
        except Exception as problem:  # noqa: BLE001  it belongs to whoever waits for the answer
            self._send([(number, problem)])
            return
        self._answers[number], self._numbers[answer] = answer, number

    def _step(self) -> None:
        try:
            pieces = self._engine.step()
        except Exception as problem:  # noqa: BLE001  its readers must not wait for ever
            logger(__name__).exception("a step of the engine failed; its answers are cancelled")
            self._send([(number, problem) for number in self._end_all()])
            self._check(problem)
            return
        self._num_failed_steps = 0
        items: list[tuple[int, Item]] = [(self._numbers[answer], piece) for answer, piece in pieces]
        for answer, piece in pieces:
            if piece.finish_reason is not None:
                self._forget(answer)
        self._send(items)  # whoever hears of an end finds nothing of the answer left

    def _check(self, problem: Exception) -> None:
        """EngineFailed if there is no going on after this problem, whose answers are gone."""
        self._num_failed_steps += 1
        stats = self._engine.stats()
        has_lost_blocks = stats.num_free_blocks < stats.num_blocks
        if has_lost_blocks or self._num_failed_steps >= MAX_FAILED_STEPS:
            raise _failure(problem)

    def _end_all(self) -> list[int]:
        numbers = list(self._answers)
        for answer in list(self._numbers):
            self._forget(answer)
        return numbers

    def _forget(self, answer: Answer) -> None:
        self._engine.cancel(answer)
        del self._answers[self._numbers.pop(answer)]

    def _send(self, items: list[tuple[int, Item]]) -> None:
        if items:
            self._tell(self._deliver, items)

    def _tell(self, function: Callable[[Any], None], what: object) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody is there to be told
            self._loop.call_soon_threadsafe(function, what)


def _failure(problem: BaseException) -> EngineFailed:
    return EngineFailed(
        "the engine has failed and cannot go on",
        found=type(problem).__name__,
        fix="restart the server; its log says more",
    )
