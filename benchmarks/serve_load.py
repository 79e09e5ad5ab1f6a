"""The load of `serve_neighbours.py --load`: many workers who ask, leave, read slowly, want JSON.

No answer may be a 5xx but a 503 with Retry-After while the server drains, a full queue is a 429
with Retry-After, memory is flat, and in the end all blocks are free.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from typing import Any

import httpx

MAX_GROWTH_BYTES = 64 * 2**20
"""Of resident memory from the middle third to the last: allocators are not exact."""
WATCH_SECONDS = 0.5
SCHEMA_KINDS = 40  # more than are kept


class Load:
    """Workers of four kinds, by their number."""

    def __init__(self, served: Any, route: str, num_workers: int, seconds: float) -> None:
        self._served, self._num_workers, self._seconds = served, num_workers, seconds
        self._url = served.url + route
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []
        self.memory: list[int] = []

    async def run(self) -> None:
        self._deadline = time.monotonic() + self._seconds
        limits = httpx.Limits(max_connections=self._num_workers + 8)
        headers = self._served.headers("load")
        async with httpx.AsyncClient(limits=limits, timeout=600, headers=headers) as client:
            workers = [self._work(client, number) for number in range(self._num_workers)]
            await asyncio.gather(self._watch(), *workers)

    async def _watch(self) -> None:
        while time.monotonic() < self._deadline:
            self.memory.append(self._served.resident_bytes())
            await asyncio.sleep(WATCH_SECONDS)

    async def _work(self, client: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < self._deadline:
            try:
                await self._ask(client, number % 4, dice)
            except httpx.HTTPError as problem:
                self.faults.append(repr(problem))

    async def _ask(self, client: httpx.AsyncClient, kind: int, dice: random.Random) -> None:
        text = f"Tell me story {dice.randrange(1000)}."
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": dice.choice([8, 40, 200]),
            "stream": dice.random() < 0.7,
            "n": dice.choice([1, 1, 1, 4]),
        }
        if kind == 3:
            names = [f"p{dice.randrange(SCHEMA_KINDS)}", "q"]
            schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
            form = {"name": "x", "schema": schema | {"required": names}}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        patience = dice.randrange(1, 20) if kind == 1 else None
        async with client.stream("POST", self._url, json=body) as reply:
            self.statuses[reply.status_code] += 1
            async for _ in reply.aiter_raw():
                if kind == 2:
                    await asyncio.sleep(dice.random())
                if patience is not None and (patience := patience - 1) <= 0:
                    return
        if reply.status_code == 429:
            await asyncio.sleep(self._wait_of(reply))
        elif reply.status_code != 200:
            self.faults.append(f"status {reply.status_code}")

    def _wait_of(self, reply: httpx.Response) -> float:
        if "retry-after" not in reply.headers:
            self.faults.append(f"{reply.status_code} without Retry-After")
        return float(reply.headers.get("retry-after", 1))


async def drain(served: Any, route: str) -> list[str]:
    """What goes wrong when the server is told to end while it answers."""
    faults = []
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 100}
    headers = served.headers("load")
    async with httpx.AsyncClient(timeout=600, headers=headers) as client:

        async def ask() -> httpx.Response:
            return await client.post(served.url + route, json=body | {"n": 8})

        running = [asyncio.create_task(ask()) for _ in range(4)]
        while not served.metrics()["requests_running"]:
            await asyncio.sleep(0.05)
        served.process.send_signal(signal.SIGTERM)
        while True:
            try:
                late = await client.post(served.url + route, json=body | {"max_tokens": 1})
            except httpx.HTTPError:
                break  # it has ended
            if late.status_code == 503 and "retry-after" not in late.headers:
                faults.append("a 503 without Retry-After")
            elif late.status_code not in (200, 503):
                faults.append(f"status {late.status_code} while draining")
            await asyncio.sleep(0.05)
        replies = await asyncio.gather(*running)
        faults += [f"a running request got {r.status_code}" for r in replies if r.is_error]
    if (code := await asyncio.to_thread(served.process.wait)) != 0:
        faults.append(f"the server ended with {code}")
    return faults


def load(served: Any, route: str, num_workers: int, seconds: float) -> bool:
    """Prints what happened; whether all is as it should be."""
    done = Load(served, route, num_workers, seconds)
    asyncio.run(done.run())
    while True:
        idle = served.metrics()
        if idle["requests_running"] + idle["requests_waiting"] == 0:
            break
        time.sleep(0.2)
    num_lost = idle["cache_blocks"] - idle["cache_blocks_free"]
    third = len(done.memory) // 3
    growth = max(done.memory[2 * third :]) - max(done.memory[third : 2 * third] or [0])
    faults = [*done.faults, *asyncio.run(drain(served, route))]
    print(f"{num_workers} workers, {seconds:g} s: statuses {dict(sorted(done.statuses.items()))}")
    print(f"memory at most {max(done.memory) / 2**20:.0f} MB, last third {growth / 2**20:+.1f} MB")
    print(f"blocks lost: {num_lost:.0f}; faults: {len(faults)} {sorted(set(faults))[:10]}")
    return not faults and not num_lost and growth < MAX_GROWTH_BYTES and done.statuses[200] > 0
