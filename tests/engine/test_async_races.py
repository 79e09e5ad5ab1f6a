"""Cancellations at the worst moments, and what is left afterwards: nothing.

Oracle: the same requests through the synchronous engine, and empty tables. No test waits for a
time: a hook cancels between two instructions, or holds the engine's thread at a step until the loop
has done its part.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_async_engine import GREEDY, LONG, run, started, text_of

from rorqual.engine import AsyncEngine, Engine, Grammar, Request, SamplingParams, async_engine
from rorqual.errors import RorqualError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

NUM_ROUNDS = 12


class Watched(dict[int, Any]):
    """A table that calls `hook` with the key after each look at it."""

    hook: Callable[[int], None]

    def get(self, key: int, default: Any = None) -> Any:
        value = super().get(key, default)
        self.hook(key)
        return value


class Gate:
    """Holds the engine's thread before each step until the test lets it go on."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._steps, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        step = engine.step

        def gated() -> Any:
            self._arrived.release()
            self._steps.acquire()
            return step()

        monkeypatch.setattr(engine, "step", gated)

    async def arrival(self) -> None:
        """The thread stands before its next step."""
        await asyncio.to_thread(self._arrived.acquire)

    def let(self, num_steps: int) -> None:
        self._steps.release(num_steps)


@pytest.fixture
def engine(model: DeepseekV3, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, max_batch=4, speculate=1)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The thread sides of all engines that start."""
    made: list[Any] = []

    class Noted(async_engine._Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(async_engine, "_Worker", Noted)
    yield made
    made.clear()


async def settle(face: AsyncEngine) -> None:
    """A request behind all commands that were given: when it is over they were obeyed."""
    assert await text_of(face.submit(Request([5], GREEDY)))


def assert_nothing_left(face: AsyncEngine, engine: Engine, worker: Any) -> None:
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_waiting, stats.num_running) == (0, 0)
    assert not engine._sequences
    assert not face._open
    assert not worker._answers
    assert not worker._numbers
    assert not engine._pool._key_of.keys() - engine._pool._cached.keys()


def test_a_cancel_while_a_piece_is_delivered_loses_nobody_elses(
    engine: Engine, workers: list[Any]
) -> None:
    """From another thread, between the look for an inbox and its removal; both answers end in the
    same delivery, so that the second one's end would be lost with the first one's.
    """
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    expected = engine.generate([[7], [8]], params)

    async def test() -> None:
        async with started(engine) as face:
            inboxes = face._open = Watched()

            def cancel(number: int) -> None:
                if number == first._number:
                    thread = threading.Thread(target=face.cancel, args=(number,))
                    thread.start()
                    thread.join()

            inboxes.hook = cancel
            first, second = (face.submit(Request([n], params)) for n in (7, 8))
            assert await text_of(second) == expected[1].text
            assert first._inbox.qsize() == 1
            await settle(face)
            assert_nothing_left(face, engine, workers[0])

    run(test())


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("way", ["close", "forget", "task"])
def test_an_answer_cancelled_at_any_stage_leaves_nothing(
    engine: Engine,
    workers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    num_steps: int,
    way: str,
) -> None:
    """Queued, in its prompt, in its answer; six at once, so that two always wait."""
    expected = engine.generate([[5]], GREEDY)[0].text

    async def test() -> None:
        async with started(engine) as face:
            with monkeypatch.context() as patch:
                gate = Gate(engine, patch)
                streams = [face.submit(Request(prompt, LONG)) for prompt in prompts]
                readers = [asyncio.create_task(text_of(stream)) for stream in streams]
                await gate.arrival()
                for _ in range(num_steps):
                    gate.let(1)
                    await gate.arrival()
                if way == "close":
                    for stream in streams:
                        await stream.aclose()
                for reader in readers:
                    reader.cancel()
                await asyncio.wait(readers)
                readers.clear()
                del reader  # a task that was cancelled holds its stream
                if way != "task":
                    streams.clear()
                gate.let(1000)
                if way == "task":
                    for stream in streams:
                        await stream.aclose()
                    streams.clear()
                gc.collect()
                assert await text_of(face.submit(Request([5], GREEDY))) == expected
            await settle(face)
            assert_nothing_left(face, engine, workers[0])

    run(test())


def test_faults_leave_nothing(
    engine: Engine, workers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that cannot be used, a prompt that cannot be answered, steps that fail."""
    bad = SamplingParams(grammar=Grammar("regex", "("))

    async def test() -> None:
        async with started(engine) as face:
            for _ in range(NUM_ROUNDS):
                with pytest.raises(RorqualError):
                    await text_of(face.submit(Request([5], bad)))
                with pytest.raises(RorqualError):
                    face.submit(Request([], GREEDY))
                with monkeypatch.context() as patch:
                    patch.setattr(engine._runner, "step", lambda *_, **__: 1 // 0)
                    streams = [face.submit(Request([5, n], GREEDY)) for n in range(6)]
                    ends = await asyncio.gather(*map(text_of, streams), return_exceptions=True)
                    assert all(isinstance(end, ZeroDivisionError) for end in ends)
                await settle(face)
            assert_nothing_left(face, engine, workers[0])

    run(test())


def test_engines_leave_no_thread(engine: Engine) -> None:
    before = set(threading.enumerate())

    async def test() -> None:
        for _ in range(3):
            async with started(engine) as face:
                open_one = face.submit(Request([5], LONG))
                await anext(open_one)
            with pytest.raises(RorqualError):
                await text_of(open_one)

    run(test())
    for thread in set(threading.enumerate()) - before:
        thread.join()  # the one that warms up ends by itself
    assert not engine.has_work
