"""Threads that clients share. Oracle: the order in which work begins, by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine

import pytest

from patience import HANG_SECONDS
from rorqual.engine import EngineOverloaded
from rorqual.serve.fair_pool import Caller, FairPool
from rorqual.serve.lengths import SPACES, num_certain_chars, num_chars

pytestmark = pytest.mark.concurrency

A, B, C = (Caller(owner=name) for name in "abc")
LINES = Caller(True, "a")


class Gates:
    """Work that says that it has begun, and goes on when it is let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}
        self._has_changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def work(self, name: str) -> Callable[[], str]:
        gate = self._gates[name] = threading.Event()

        def run() -> str:
            self.begun.append(name)
            self._loop.call_soon_threadsafe(self._has_changed.set)
            assert gate.wait(HANG_SECONDS)
            return name

        return run

    def let(self, name: str) -> None:
        self._gates[name].set()

    def let_all(self) -> None:
        for gate in self._gates.values():
            gate.set()

    async def until_begun(self, num: int) -> list[str]:
        while len(self.begun) < num:
            self._has_changed.clear()
            await self._has_changed.wait()
        return sorted(self.begun)


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await test()

    asyncio.run(limited())


def test_a_client_never_has_all_threads_and_clients_take_turns() -> None:
    async def test() -> None:
        pool, gates = FairPool("test", num_threads=2, max_waiting=50), Gates()
        names = {f"a{number}": A for number in range(5)}
        tasks = [asyncio.create_task(pool.run(c, gates.work(n))) for n, c in names.items()]
        assert await gates.until_begun(1) == ["a0"]
        await asyncio.sleep(0)
        assert (pool.num_running, pool.num_waiting) == (1, 4)
        for name, caller in (("b0", B), ("b1", B), ("c0", C)):
            tasks.append(asyncio.create_task(pool.run(caller, gates.work(name))))
        assert await gates.until_begun(2) == ["a0", "b0"]
        for ends, begins in (("b0", "b1"), ("a0", "a1"), ("a1", "c0")):  # and not "a2"
            gates.let(ends)
            assert begins in await gates.until_begun(len(gates.begun) + 1)
        gates.let_all()
        assert await asyncio.gather(*tasks) == [*names, "b0", "b1", "c0"]
        assert (pool.num_running, pool.num_waiting) == (0, 0)
        pool.close()

    run(test)


def test_batches_wait_for_all_others() -> None:
    async def test() -> None:
        pool, gates = FairPool("test", num_threads=1, max_waiting=50), Gates()
        order = [("first", A), ("line", LINES), ("line 2", LINES), ("b0", B), ("b1", B)]
        tasks = [asyncio.create_task(pool.run(c, gates.work(n))) for n, c in order]
        await gates.until_begun(1)
        gates.let_all()
        await asyncio.gather(*tasks)
        assert gates.begun == ["first", "b0", "b1", "line", "line 2"]
        pool.close()

    run(test)


def test_a_full_queue_refuses_and_keeps_places_for_others() -> None:
    async def test() -> None:
        pool, gates = FairPool("test", num_threads=1, max_waiting=4), Gates()
        tasks = [asyncio.create_task(pool.run(A, gates.work("a")))]
        await gates.until_begun(1)
        for number in range(3):
            tasks.append(asyncio.create_task(pool.run(A, gates.work(f"a{number}"))))
            await asyncio.sleep(0)
        with pytest.raises(EngineOverloaded):
            await pool.run(A, gates.work("too many"))
        tasks.append(asyncio.create_task(pool.run(B, gates.work("b"))))
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloaded):
            await pool.run(C, gates.work("full"))
        gates.let_all()
        await asyncio.gather(*tasks)
        pool.close()

    run(test)


def test_who_leaves_while_it_waits_has_no_place_and_faults_are_handed_on() -> None:
    async def test() -> None:
        pool, gates = FairPool("test", num_threads=1, max_waiting=4), Gates()
        first = asyncio.create_task(pool.run(A, gates.work("first")))
        await gates.until_begun(1)
        waiting = asyncio.create_task(pool.run(A, gates.work("never")))
        await asyncio.sleep(0)
        assert pool.num_waiting == 1
        waiting.cancel()
        await asyncio.wait([waiting])
        assert pool.num_waiting == 0
        first.cancel()  # what has begun goes on, and its thread is free afterwards
        await asyncio.wait([first])
        assert pool.num_running == 1
        gates.let("first")
        with pytest.raises(ZeroDivisionError):
            await pool.run(B, lambda: 1 // 0)
        assert gates.begun == ["first"]
        pool.close()

    run(test)


def test_what_counts_of_a_conversation() -> None:
    assert {chr(code) for code in range(0x3100) if chr(code).isspace()} == set(SPACES)
    messages = [
        {"role": "system", "content": " a b\u3000"},
        {"role": "assistant", "content": "thought</think>c\n", "tool_calls": [{"id": "x"}]},
        {"role": "assistant", "content": "said so loudly"},
        {"role": "assistant", "content": "a</think>b</think>cd"},
        {"role": "user", "content": None},
        {"role": "tool", "content": "</think>"},
    ]
    assert num_certain_chars(messages) == 2 + 1 + 12 + 2 + 8
    assert num_chars([{"ab": ["c", 1, None, ("d",)]}]) == 4
