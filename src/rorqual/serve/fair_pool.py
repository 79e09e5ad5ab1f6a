"""Threads for one kind of work, shared alike by whoever asks.

Tokenising and compiling take seconds if somebody wants them to. So each has a pool of its own: the
event loop never waits, no client has all threads while there are two, waiting work is taken client
by client, and a queue that is full says so at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.types import Scope

from rorqual.engine import FREE_PLACES_FACTOR, EngineOverloaded

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Caller:
    """Who asks: a key's owner, or an address. Batches run in the background."""

    is_background: bool = False
    owner: str = ""


def owner_of(scope: Scope) -> str:
    """The key's owner; without keys the address at the other end of the connection, which no header
    can change.
    """
    owner: str = scope.get("state", {}).get("owner", "")
    host = scope["client"][0] if scope.get("client") else ""
    return owner or f"address {host}"


@dataclass(frozen=True, eq=False)
class _Job:
    work: Callable[[], Any]
    result: asyncio.Future[Any]


class FairPool:
    """`num_threads` threads; of `max_waiting` places to wait a client has at most three times as
    many as are free.
    """

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=f"rorqual-{name}")
        self._num_threads, self._max_waiting = num_threads, max_waiting
        self._max_own = max(1, num_threads - 1)
        self._waiting: OrderedDict[Caller, deque[_Job]] = OrderedDict()  # the next one first
        self._running: Counter[Caller] = Counter()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def num_running(self) -> int:
        return self._running.total()

    async def run(self, caller: Caller, work: Callable[[], T]) -> T:
        """What `work` returns or raises; EngineOverloaded if too much waits. Whoever is cancelled
        while it waits has no place any more; work that has begun goes on to its end.
        """
        jobs = self._waiting.setdefault(caller, deque())
        num_free = self._max_waiting - self.num_waiting
        if len(jobs) >= FREE_PLACES_FACTOR * num_free:
            self._forget(caller)
            raise EngineOverloaded("too many texts wait", found=f"{len(jobs)} of one client")
        job = _Job(work, asyncio.get_running_loop().create_future())
        jobs.append(job)
        self._begin()
        try:
            result: T = await job.result
            return result
        finally:
            if job in jobs:
                jobs.remove(job)
                self._forget(caller)

    def close(self) -> None:
        """Nothing more begins."""
        self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        while self.num_running < self._num_threads:
            ready = [c for c in self._waiting if self._running[c] < self._max_own]
            if not ready:
                return
            caller = min(ready, key=lambda c: (c.is_background, self._running[c]))
            job = self._waiting[caller].popleft()
            self._waiting.move_to_end(caller)
            self._forget(caller)
            self._running[caller] += 1
            tell = partial(self._tell, asyncio.get_running_loop(), caller, job)
            self._executor.submit(job.work).add_done_callback(tell)

    def _tell(
        self, loop: asyncio.AbstractEventLoop, caller: Caller, job: _Job, done: Future[Any]
    ) -> None:
        """In the thread that did the work."""
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(self._end, caller, job, done)

    def _end(self, caller: Caller, job: _Job, done: Future[Any]) -> None:
        self._running[caller] -= 1
        if not self._running[caller]:
            del self._running[caller]
        if not job.result.done():  # else nobody waits any more
            problem = done.exception()
            if problem is not None:
                job.result.set_exception(problem)
            else:
                job.result.set_result(done.result())
        self._begin()

    def _forget(self, caller: Caller) -> None:
        if not self._waiting.get(caller, True):
            del self._waiting[caller]
