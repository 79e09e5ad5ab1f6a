"""Oracle: the same requests through the synchronous engine."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress

import pytest

from patience import HANG_SECONDS
from rorqual.engine import (
    AnswerStream,
    AsyncEngine,
    Engine,
    EngineFailed,
    EngineOverloaded,
    Grammar,
    Piece,
    Request,
    SamplingParams,
)
from rorqual.engine.answer import Answer
from rorqual.engine.async_engine import MAX_FAILED_STEPS
from rorqual.errors import RorqualError, UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)


def run(test: Coroutine[None, None, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await test

    asyncio.run(limited())


@asynccontextmanager
async def started(engine: Engine, max_queue: int = 256) -> AsyncIterator[AsyncEngine]:
    face = AsyncEngine(engine, max_queue=max_queue)
    await face.start()
    try:
        yield face
    finally:
        await face.close()


async def text_of(stream: AnswerStream) -> str:
    return "".join([piece.text async for piece in stream])


async def until_free(face: AsyncEngine) -> None:
    """Waits until nothing holds a block."""
    while (stats := face.stats()).num_free_blocks < stats.num_blocks:
        await asyncio.sleep(0.01)


@pytest.fixture
def engine(model: DeepseekV3, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, max_batch=4)


class Held:
    """An engine whose steps wait to be allowed: what runs cannot end before a test wants it to."""

    def __init__(self, engine: Engine) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self._step = engine.step
        engine.step = self._wait_and_step  # type: ignore[method-assign]

    def allow(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def release(self) -> None:
        self._is_open = True
        self.allow(1)

    def _wait_and_step(self) -> list[tuple[Answer, Piece]]:
        if not self._is_open:
            assert self._permits.acquire(timeout=HANG_SECONDS)
        return self._step()


def test_many_at_once_equal_each_alone(engine: Engine, prompts: list[list[int]]) -> None:
    expected = [output.text for output in engine.generate(prompts, GREEDY)]

    async def test() -> None:
        async with started(engine) as face:
            streams = [face.submit(Request(prompt, GREEDY)) for prompt in prompts]
            assert await asyncio.gather(*map(text_of, streams)) == expected
            assert await face.drain(HANG_SECONDS)

    run(test())


def test_a_given_up_wait_loses_nothing(engine: Engine, prompts: list[list[int]]) -> None:
    expected = engine.generate(prompts[:1], GREEDY)[0]

    async def test() -> None:
        async with started(engine) as face:
            held = Held(engine)
            stream = face.submit(Request(prompts[0], GREEDY))
            pieces: list[Piece] = []
            while not pieces or pieces[-1].finish_reason is None:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(stream), 0.001)
                held.allow(1)
                pieces.append(await anext(stream))
            assert [i for piece in pieces for i in piece.token_ids] == expected.token_ids
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(test())


def test_closed_and_forgotten_streams_free_their_blocks(
    engine: Engine, prompts: list[list[int]]
) -> None:
    async def test() -> None:
        async with started(engine) as face:
            async with aclosing(face.submit(Request(prompts[2], LONG))) as stream:
                await anext(stream)
            await until_free(face)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            forgotten = face.submit(Request(prompts[2], LONG))
            await anext(forgotten)
            del forgotten
            gc.collect()
            await until_free(face)

            has_begun = asyncio.Event()

            async def reader() -> None:
                async with aclosing(face.submit(Request(prompts[4], LONG))) as pieces:
                    async for _ in pieces:
                        has_begun.set()

            task = asyncio.create_task(reader())
            await has_begun.wait()
            task.cancel()
            await asyncio.wait([task])
            await until_free(face)
            assert face.stats().num_running == 0

    run(test())


def test_a_reader_that_sleeps_stalls_nobody(engine: Engine, prompts: list[list[int]]) -> None:
    async def test() -> None:
        async with started(engine) as face:
            sleeper = face.submit(Request(prompts[1], GREEDY))
            assert await text_of(face.submit(Request(prompts[2], LONG)))
            assert await text_of(sleeper)  # all of it waits there

    run(test())


def test_too_many_are_refused(engine: Engine) -> None:
    async def test() -> None:
        async with started(engine, max_queue=2) as face:
            streams = [face.submit(Request([5, n], LONG)) for n in range(6)]
            with pytest.raises(EngineOverloaded, match="too many"):
                face.submit(Request([7], GREEDY))
            await streams[0].aclose()
            assert await text_of(face.submit(Request([7], GREEDY)))
            for stream in streams:
                await stream.aclose()

    run(test())


def test_draining_finishes_what_runs_and_takes_nothing(engine: Engine) -> None:
    async def test() -> None:
        face = AsyncEngine(engine)
        with pytest.raises(EngineOverloaded):
            face.submit(Request([5], GREEDY))  # not started yet
        await face.start()
        held = Held(engine)
        stream, endless = face.submit(Request([5], GREEDY)), face.submit(Request([6], LONG))
        assert not await face.drain(0.001)
        held.release()
        with pytest.raises(EngineOverloaded):
            face.submit(Request([7], GREEDY))
        await endless.aclose()
        assert await face.drain(HANG_SECONDS)
        assert len(await text_of(stream)) > 0
        await face.close()

    run(test())


def test_closing_ends_open_answers(engine: Engine) -> None:
    async def test() -> None:
        face = AsyncEngine(engine)
        await face.start()
        held = Held(engine)
        stream = face.submit(Request([5], LONG))
        held.allow(1)
        await anext(stream)
        closing = asyncio.create_task(face.close())
        await asyncio.sleep(0)  # it has told the thread, and waits for its step
        held.release()
        await closing
        with pytest.raises(EngineOverloaded, match="closed"):
            await text_of(stream)
        assert not engine.has_work

    run(test())


def test_faults_reach_whoever_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(engine) as face:
            with pytest.raises(UsageError, match="empty"):
                face.submit(Request([], GREEDY))
            bad = SamplingParams(grammar=Grammar("regex", "("))
            with pytest.raises(RorqualError):
                await text_of(face.submit(Request([5], bad)))
            with monkeypatch.context() as patch:
                patch.setattr(engine, "step", lambda: 1 // 0)
                with pytest.raises(ZeroDivisionError):
                    await text_of(face.submit(Request([5], GREEDY)))
            await until_free(face)
            assert await text_of(face.submit(Request([5], GREEDY)))

    run(test())


@pytest.mark.parametrize("fault", [RuntimeError("the device is gone"), SystemExit(3)])
def test_an_engine_that_cannot_go_on_says_so_and_leaves_nobody_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    """A fault in every step, or one that ends the thread."""

    def fail() -> None:
        raise fault

    async def test() -> None:
        async with started(engine) as face:
            monkeypatch.setattr(engine, "step", fail)
            for _ in range(MAX_FAILED_STEPS - 1 if isinstance(fault, Exception) else 0):
                with pytest.raises(type(fault)):
                    await text_of(face.submit(Request([5], GREEDY)))
                assert face.failure is None
            streams = [face.submit(Request([5, n], GREEDY)) for n in range(8)]
            ends = await asyncio.gather(*map(text_of, streams), return_exceptions=True)
            assert all(isinstance(end, RuntimeError | EngineFailed) for end in ends)
            while face.failure is None:
                await asyncio.sleep(0.01)
            with pytest.raises(EngineFailed, match=type(fault).__name__):
                face.submit(Request([5], GREEDY))
            assert await face.drain(HANG_SECONDS), "nothing is open"

    run(test())


def test_lost_blocks_are_a_failure(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(engine) as face:

            def fail() -> None:
                engine._pool.take(1, after=None)
                raise ValueError

            monkeypatch.setattr(engine, "step", fail)
            with pytest.raises(ValueError):
                await text_of(face.submit(Request([5], GREEDY)))
            while face.failure is None:
                await asyncio.sleep(0.01)

    run(test())


def test_the_first_grammar_finds_its_trie(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    llguidance = pytest.importorskip("llguidance")
    made = []
    build = llguidance.LLTokenizer
    monkeypatch.setattr(llguidance, "LLTokenizer", lambda *args: made.append(1) or build(*args))

    async def test() -> None:
        async with started(engine) as face:
            while not made:
                await asyncio.sleep(0.01)
            params = SamplingParams(grammar=Grammar("regex", "a"), temperature=0)
            assert await text_of(face.submit(Request([5], params))) == "a"
            assert made == [1]

    run(test())


def test_no_owner_takes_all_places(engine: Engine) -> None:
    """Of sixteen places one client gets twelve, and two others find theirs; nobody's name and
    answers of nobody share nothing.
    """

    def fill(face: AsyncEngine, owner: str, *, is_background: bool = False) -> list[AnswerStream]:
        streams: list[AnswerStream] = []
        with suppress(EngineOverloaded):
            while True:
                streams.append(face.submit(Request([5], LONG, owner, is_background)))
        return streams

    async def test() -> None:
        async with started(engine, max_queue=12) as face:
            streams = fill(face, "a")
            assert len(streams) == 12
            with pytest.raises(EngineOverloaded, match="one client"):
                face.submit(Request([5], LONG, "a"))
            streams += fill(face, "b")
            assert len(streams) == 15
            streams.append(face.submit(Request([5], GREEDY, "c")))
            with pytest.raises(EngineOverloaded, match="16 are open"):
                face.submit(Request([5], GREEDY, "d"))
            for stream in streams:
                await stream.aclose()
            lines = fill(face, "a", is_background=True)
            assert len(lines) == 8
            own = fill(face, "a")
            assert len(own) == 6, "its batch does not count"
            for stream in (*lines, *own):
                await stream.aclose()
            nobody = fill(face, "")
            assert len(nobody) == 16
            for stream in nobody:
                await stream.aclose()

    run(test())


@pytest.mark.slow
def test_answers_set_back_for_another_owner_stay_the_same(
    engine: Engine, prompts: list[list[int]]
) -> None:
    expected = [output.text for output in engine.generate(prompts[:5], LONG)]

    async def test() -> None:
        async with started(engine) as face:
            held = Held(engine)
            hogs = [face.submit(Request(prompt, LONG, "hog")) for prompt in prompts[:4]]
            for _ in range(8):
                held.allow(1)
                await anext(hogs[0])
            new = face.submit(Request(prompts[4], LONG, "new"))
            held.release()
            texts = await asyncio.gather(*map(text_of, [*hogs[1:], new]))
            assert texts == expected[1:]
            assert face.stats().num_preemptions == 1

    run(test())
