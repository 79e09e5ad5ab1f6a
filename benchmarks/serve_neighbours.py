"""What a short request of its own key waits beside neighbours who ask for much, and /health too.

The real server with the bundled model at 8,192 positions. Beside each of: schemas of 6,000
properties, twelve prompts of 4 MB, two requests with n=128, 200 streams of another key. The median
of 20 first tokens must come within five times the unloaded one, or within three steps of the
running batch if that is longer (a step is the mean time between the tokens of an answer, as
/metrics tells it); /health within a second at worst. Exits with 1 if a bar is missed.

    python benchmarks/serve_neighbours.py               # about three minutes
    python benchmarks/serve_neighbours.py --quick       # five first tokens beside each
    python benchmarks/serve_neighbours.py --load        # 400 workers, 150 s: --workers, --seconds
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

POSITIONS = 8192
KEYS = {"short": "key-of-the-short-one", "hog": "key-of-the-neighbour", "load": "key-of-the-load"}
HEALTH_BAR_SECONDS = 1.0
TIMES_UNLOADED, STEPS = 5, 3
HEALTH_PAUSE_SECONDS = 0.05
SETTLE_SECONDS = 2.0
TEXT = "The whale swims in the sea; the sea is deep. One, two, three whales sing.\n"
SHORT = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"
NEIGHBOURS = ("schema of 6,000 properties", "twelve prompts of 4 MB", "two n=128", "200 streams")


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen[str]

    def headers(self, who: str) -> dict[str, str]:
        return {"authorization": f"Bearer {KEYS[who]}"}

    def metrics(self) -> dict[str, float]:
        text = httpx.get(self.url + "/metrics", headers=self.headers("short"), timeout=600).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("rorqual_"): float(value) for name, value in lines}

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096


@contextmanager
def server() -> Iterator[Served]:
    from rorqual.bundled import checkpoint_path

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny-8192"
        shutil.copytree(checkpoint_path("tiny"), folder)
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = POSITIONS
        (folder / "config.json").write_text(json.dumps(config))
        keys = Path(temporary) / "keys"
        keys.write_text("\n".join(KEYS.values()))
        command = [sys.executable, "-m", "rorqual", "serve", "--model", str(folder), "--port", "0"]
        command += ["--api-key-file", str(keys), "--state-dir", str(Path(temporary) / "state")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield Served(_url(process), process)
            finally:
                process.kill()


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None, "a pipe"
    for line in process.stderr:
        if found := re.search(r"at (http://\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            url = found[1]
            while True:
                try:
                    if httpx.get(url + "/ready", timeout=60).status_code == 200:
                        return url
                except httpx.HTTPError:
                    time.sleep(0.1)
    raise SystemExit("the server did not start")


# What the neighbours do, in a process of their own, until it is killed.


def body_of(kind: str, number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me story {number} of the sea."}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 1000, "stream": True}
    if kind == NEIGHBOURS[0]:  # each is new to the cache; every other one cannot be enforced
        names = [f"property_{number}_{n}" for n in range(6000)]
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        schema |= {"required": names} if number % 2 else {}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return body | {"response_format": form, "max_tokens": 50}
    if kind == NEIGHBOURS[1]:
        content = (TEXT * 60_000)[:4_000_000]
        return body | {"messages": [{"role": "user", "content": content}]}
    return body | ({"n": 128} if kind == NEIGHBOURS[2] else {})


def be_neighbour(kind: str, url: str) -> None:
    num_threads = dict(zip(NEIGHBOURS, (2, 12, 2, 200), strict=True))[kind]
    headers = {"authorization": f"Bearer {KEYS['hog']}", "content-type": "application/json"}
    same = json.dumps(body_of(kind, 0)).encode()

    def ask(number: int) -> None:
        while True:
            is_schema = kind == NEIGHBOURS[0]
            content = json.dumps(body_of(kind, number)).encode() if is_schema else same
            number += num_threads
            try:
                with client.stream("POST", url + CHAT, content=content, headers=headers) as reply:
                    for _ in reply.iter_raw():
                        pass
                    if reply.status_code == 429:
                        time.sleep(float(reply.headers["retry-after"]))
            except httpx.HTTPError as problem:
                print(f"the neighbour: {problem!r}", file=sys.stderr)

    limits = httpx.Limits(max_connections=num_threads)
    with httpx.Client(timeout=600, limits=limits) as client:
        threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(num_threads)]
        for thread in threads:
            thread.start()
        print("begun", flush=True)
        for thread in threads:
            thread.join()


# Measuring.


def first_token_seconds(served: Served, client: httpx.Client) -> float:
    body = SHORT | {"stream": True}
    start = time.perf_counter()
    url, headers = served.url + CHAT, served.headers("short")
    with client.stream("POST", url, json=body, headers=headers) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and '"content": "' in line:
                return time.perf_counter() - start
        raise SystemExit(f"the short request was not answered: {reply.status_code}")


class Health:
    """Asks again and again, in a thread; the worst time."""

    def __init__(self, url: str) -> None:
        self.worst_seconds = 0.0
        self._url, self._is_over = url, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(timeout=600) as client:
            while not self._is_over.wait(HEALTH_PAUSE_SECONDS):
                start = time.perf_counter()
                client.get(self._url + "/health").raise_for_status()
                self.worst_seconds = max(self.worst_seconds, time.perf_counter() - start)

    def end(self) -> float:
        self._is_over.set()
        self._thread.join()
        return self.worst_seconds


def step_seconds(before: dict[str, float], after: dict[str, float]) -> float:
    total, count = (
        after[f"inter_token_seconds_{part}"] - before[f"inter_token_seconds_{part}"]
        for part in ("sum", "count")
    )
    return total / count if count else 0.0


def measure(served: Served, kind: str, num: int) -> dict[str, float]:
    """First tokens beside one kind of neighbours, or beside nobody."""
    command = [sys.executable, __file__, "--neighbour", kind, "--url", served.url]
    neighbour = subprocess.Popen(command, stdout=subprocess.PIPE) if kind else None
    try:
        if neighbour is not None:
            assert neighbour.stdout is not None, "a pipe"
            neighbour.stdout.readline()
            time.sleep(SETTLE_SECONDS)
        health, before = Health(served.url), served.metrics()
        with httpx.Client(timeout=600) as client:
            seconds = [first_token_seconds(served, client) for _ in range(num)]
        step = step_seconds(before, served.metrics())
        result = {"median": statistics.median(seconds), "worst": max(seconds), "step": step}
        return result | {"health": health.end()}
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def until_idle(served: Served) -> dict[str, float]:
    while True:
        now = served.metrics()
        if now["requests_running"] + now["requests_waiting"] == 0:
            return now
        time.sleep(0.2)


def neighbours(num: int) -> bool:
    """Prints the table; whether all bars are met."""
    are_met = True
    with server() as served:
        measure(served, "", 3)
        alone = measure(served, "", num)["median"]
        print(f"alone: first token after {alone * 1000:.0f} ms (median of {num})")
        print("| beside | first token | worst | bar | step | /health worst | memory MB | |")
        print("|---|---|---|---|---|---|---|---|")
        for kind in NEIGHBOURS:
            got = measure(served, kind, num)
            until_idle(served)
            bar = max(TIMES_UNLOADED * alone, STEPS * got["step"])
            is_met = got["median"] <= bar and got["health"] <= HEALTH_BAR_SECONDS
            are_met &= is_met
            times = [f"{s * 1000:.0f} ms" for s in (got["median"], got["worst"], bar, got["step"])]
            cells = [kind, *times, f"{got['health'] * 1000:.0f} ms"]
            cells += [f"{served.resident_bytes() / 2**20:.0f}", "met" if is_met else "MISSED"]
            print(f"| {' | '.join(cells)} |", flush=True)
    return are_met


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five first tokens beside each")
    parser.add_argument("--load", action="store_true", help="many workers of every kind instead")
    parser.add_argument("--seconds", type=float, default=150, help="how long --load goes on")
    parser.add_argument("--workers", type=int, default=400, help="of --load")
    parser.add_argument("--neighbour", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.neighbour:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        be_neighbour(arguments.neighbour, arguments.url)
        return
    from rorqual.ops.ceilings import describe_machine

    print(f"machine: {describe_machine()}")
    if arguments.load:
        from serve_load import load

        with server() as served:
            is_good = load(served, CHAT, arguments.workers, arguments.seconds)
    else:
        is_good = neighbours(5 if arguments.quick else 20)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
