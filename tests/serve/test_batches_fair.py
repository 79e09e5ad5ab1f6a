"""Keys share what answers batches. Oracle: the order in which lines begin, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from batch_stage import ANSWER, Answer, Stages, line_of

from rorqual.serve import batch_lines
from rorqual.serve.bodies import Pacer
from rorqual.serve.fair_places import FairPlaces
from rorqual.serve.json_values import num_marks

Answering = Callable[[Answer], None]
FLOOD = 12
LINES = ["one", "two", "three"]


def test_a_batch_of_one_line_does_not_wait_for_anothers_batches(
    stages: Stages, answering: Answering
) -> None:
    """Twelve batches of one key wait with their lines; the other's is the next to begin."""
    asked: list[str] = []
    may_go_on = asyncio.Event()

    async def answer(question: str) -> str:
        asked.append(question)
        await may_go_on.wait()
        return ANSWER

    async def run() -> None:
        stage = stages(2)
        answering(answer)
        lines = [[f"{batch}-{number}" for number in range(5)] for batch in range(FLOOD)]
        for each in lines:
            await stage.begin(*each, owner="greedy")
        mine = await stage.begin("mine")
        while stage.batches._places.lines.num_waiting < 2 * FLOOD:
            await asyncio.sleep(0)
        assert len(asked) == 2
        may_go_on.set()
        reply = await stage.ended(mine)
        assert (reply.status, stage.said(reply.output_file_id)) == ("completed", ["mine"])
        assert sorted(asked) == sorted(["mine", *(name for each in lines for name in each)])
        assert asked.index("mine") == 2

    asyncio.run(run())


def test_a_free_place_goes_to_who_has_fewest_and_then_to_whose_turn_it_is() -> None:
    async def run() -> None:
        places, began, may_end = FairPlaces(2), [], asyncio.Semaphore(0)

        async def work(owner: str, number: int) -> None:
            async with places.one(owner):
                began.append(f"{owner}{number}")
                await may_end.acquire()

        names = [("a", n) for n in range(4)] + [("b", 0), ("b", 1), ("c", 0)]
        tasks = [asyncio.create_task(work(*name)) for name in names]
        await asyncio.sleep(0)
        assert began == ["a0", "a1"]
        for _ in names:
            may_end.release()
        await asyncio.gather(*tasks)
        assert began == ["a0", "a1", "b0", "a2", "c0", "b1", "a3"]
        assert not places._waiting
        assert not places._taken
        assert places._num_free == 2

    asyncio.run(run())


def test_who_leaves_takes_no_place_along() -> None:
    """Cancelled while it waits; cancelled when its turn has come and it has not begun."""

    async def run() -> None:
        places, may_end = FairPlaces(1), asyncio.Event()

        async def work(owner: str) -> str:
            async with places.one(owner):
                await may_end.wait()
                return owner

        first, second, third, fourth = (asyncio.create_task(work(name)) for name in "abcd")
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        may_end.set()
        while not first.done():
            await asyncio.sleep(0)
        third.cancel()  # in the turn of the loop in which it got the place
        assert await fourth == "d"
        assert third.cancelled()
        assert (places._num_free, list(places._waiting), dict(places._taken)) == (1, [], {})

    asyncio.run(run())


def test_what_a_batch_parses_is_paced_by_its_key(
    stages: Stages, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file's check and each line, as bodies are; requests of the key need not wait for them."""
    spent: list[tuple[str, int, int]] = []

    async def spend(self: Pacer, owner: str, num_bytes: int, num_values: int) -> None:
        spent.append((owner, num_bytes, num_values))

    async def turn(self: Pacer, owner: str, content: bytes) -> None:
        spent.append((owner, len(content), num_marks(content)))

    async def answer(question: str) -> str:
        return ANSWER

    async def run() -> None:
        stage = stages(1)
        answering(answer)
        monkeypatch.setattr(Pacer, "spend", spend)
        monkeypatch.setattr(Pacer, "turn", turn)
        assert (await stage.ended(await stage.begin("one", "two"))).status == "completed"
        one, two = line_of("one") + b"\n", line_of("two")
        expected = [one + two, one, two]
        assert spent == [("batches of me", len(raw), num_marks(raw)) for raw in expected]

    asyncio.run(run())


def test_a_drain_does_not_wait_for_a_long_files_check(
    stages: Stages, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next server checks the file anew, and answers each line once."""
    asked: list[str] = []

    async def answer(question: str) -> str:
        asked.append(question)
        return ANSWER

    async def run() -> None:
        answering(answer)
        first = stages(1)
        monkeypatch.setattr(batch_lines, "STRETCH_BYTES", 1)
        spend, num_steps = Pacer.spend, 0

        async def count(self: Pacer, *amounts: Any) -> None:
            nonlocal num_steps
            num_steps += 1
            first.service.is_draining = True

        with monkeypatch.context() as patch:
            patch.setattr(Pacer, "spend", count)
            batch_id = await first.begin(*LINES)
            assert (await first.ended(batch_id)).status == "validating"
        assert (num_steps, asked) == (1, [])
        await first.batches.close()
        assert Pacer.spend is spend
        second = stages(1)
        await second.batches.look_after()
        reply = await second.ended(batch_id)
        assert (reply.status, asked) == ("completed", LINES)

    asyncio.run(run())
