"""A line's time counts from its first piece: it waits for all others. Oracle: the limit by hand,
on a clock that the test moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest
from batch_stage import Stage
from fake_engine import FakeEngine

LIMIT_SECONDS = 12_345.0


def test_the_time_that_a_line_waits_does_not_count(
    stages: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[asyncio.Timeout] = []
    make = asyncio.timeout

    def timeout(delay: float | None) -> asyncio.Timeout:
        clocks.append(make(delay))
        return clocks[-1]

    def running() -> list[asyncio.Timeout]:
        soon = asyncio.get_running_loop().time() + LIMIT_SECONDS - 1000
        return [clock for clock in clocks if (when := clock.when()) is not None and when > soon]

    async def until(is_true: Callable[[], bool]) -> None:
        while not is_true():
            await asyncio.sleep(0)

    async def run() -> None:
        stage = stages(1, request_timeout_seconds=LIMIT_SECONDS)
        engine = cast(FakeEngine, stage.service.engine)
        engine.gate.clear()
        monkeypatch.setattr(asyncio, "timeout", timeout)
        batch_id = await stage.begin("count up")
        await until(lambda: engine.num_open == 1)
        assert running() == []
        engine.hold_after = 1
        engine.gate.set()
        await until(lambda: engine.is_held and bool(running()))
        [clock] = running()
        clock.reschedule(asyncio.get_running_loop().time())
        reply = await stage.ended(batch_id)
        assert (reply.status, reply.request_counts.failed) == ("completed", 1)
        [record] = stage.records(reply.error_file_id)
        assert record["response"]["status_code"] == 504
        error = record["response"]["body"]["error"]
        assert error["message"] == "the answer took longer than this server's limit of 12345 s"

    asyncio.run(run())
