"""Two hundred streams with random cancels: nothing but documented refusals, no lost block.

Oracle: the engine's own counts before and after, and the process's memory. `RORQUAL_LOAD_SECONDS`
sets how long the long form goes on; the short one takes a few seconds.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from live import Live, running
from real import make_engine, serve_engine

from patience import HANG_SECONDS, wait_until
from rorqual.engine import Engine
from rorqual.serve.app import create_app
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder

pytestmark = pytest.mark.concurrency

NUM_STREAMS = 200
LONG_SECONDS = float(os.environ.get("RORQUAL_LOAD_SECONDS", "120"))
SHORT_STREAMS, SHORT_SECONDS = 24, 2.0
ALLOWED = {200, 429, 503}
BACK_OFF_SHARE = 1 / 60
"""Of the whole time, how long a refused stream waits: two seconds of two minutes, as Retry-After
says. Else refusals would be most of the load.
"""
MAX_GROWTH_BYTES = 32 * 2**20
"""Of resident memory from the first half to the second: allocators are not exact."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Load:
    """Streams that ask, sometimes leave, and ask again until the time is over."""

    def __init__(self, url: str, num_streams: int, seconds: float) -> None:
        self._url, self._num_streams, self._seconds = url, num_streams, seconds
        self.statuses: Counter[int] = Counter()
        self.num_cancelled = self.num_whole = self.num_errors = 0
        self.memory: list[int] = []

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._num_streams + 8)
        self._deadline = time.monotonic() + self._seconds
        async with httpx.AsyncClient(limits=limits, timeout=HANG_SECONDS) as client:
            streams = [self._stream(client, number) for number in range(self._num_streams)]
            await asyncio.gather(self._watch(), *streams)

    @property
    def _goes_on(self) -> bool:
        """Until the time is over and everything that is checked has happened at least once."""
        has_all = self.num_whole > 0 and self.num_cancelled > 0
        return time.monotonic() < self._deadline or not has_all

    async def _watch(self) -> None:
        while self._goes_on:
            self.memory.append(resident_bytes())
            await asyncio.sleep(0.2)

    async def _stream(self, client: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(number)
        while self._goes_on:
            body = {
                "messages": [{"role": "user", "content": f"whale {dice.randint(0, 20)} " * 4}],
                "max_tokens": dice.randint(1, 60),
                "stream": dice.random() < 0.8,
                "n": dice.choice((1, 1, 1, 2)),
                "temperature": dice.choice((0, 1)),
            }
            patience = dice.randint(1, 12) if dice.random() < 0.4 else None
            await self._ask(client, body, patience)

    async def _ask(
        self, client: httpx.AsyncClient, body: dict[str, object], patience: int | None
    ) -> None:
        url = self._url + "/v1/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            self.statuses[response.status_code] += 1
            text = ""
            async for line in response.aiter_lines():
                text = line or text
                if patience is not None:
                    patience -= 1
                    if patience <= 0:
                        self.num_cancelled += 1
                        return
        if response.status_code != 200:
            await asyncio.sleep(self._seconds * BACK_OFF_SHARE)
            return
        self.num_errors += '"error"' in text
        self.num_whole += 1


def load(engine: Engine, live: Live, num_streams: int, seconds: float) -> Load:
    """Runs it, and checks what must hold whatever happened."""
    done = Load(live.url, num_streams, seconds)
    asyncio.run(done.run())
    assert set(done.statuses) <= ALLOWED, done.statuses
    assert done.num_errors == 0
    assert done.num_whole > 0
    assert done.num_cancelled > 0
    wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting == 0)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks, "a block was lost"
    wait_until(lambda: live.app.state.service.num_in_flight == 0)
    return done


def test_a_short_load(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer, max_batch=8, speculate=1, cache_memory=400_000)
    with running(create_app(*serve_engine(engine, max_queue=8))) as live:
        load(engine, live, SHORT_STREAMS, SHORT_SECONDS)


def growth_bytes(memory: list[int]) -> int:
    """Of the second half's most over the first half's, in which everything has been used once."""
    middle = len(memory) // 2
    return max(memory[middle:]) - max(memory[:middle])


@pytest.mark.slow
def test_two_hundred_streams_of_the_bundled_model() -> None:
    folder = ModelFolder.find("tiny")
    engine = Engine(
        folder.load_model(), folder.load_tokenizer(), max_batch=32, speculate=2, cache_memory=2**23
    )
    with running(create_app(*serve_engine(engine, max_queue=100))) as live:
        done = load(engine, live, NUM_STREAMS, LONG_SECONDS)
    growth = growth_bytes(done.memory)
    assert growth < MAX_GROWTH_BYTES, f"memory grew by {growth / 2**20:.0f} MiB"
    assert done.statuses[200] > NUM_STREAMS
