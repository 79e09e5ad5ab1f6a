"""An engine that dies, and a server that is told to end in the middle of a load.

Oracle: the exception that is injected into the engine's step; a process's exit code.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import web
from live import Live, running
from real import make_engine, serve_engine

from patience import HANG_SECONDS, wait_until
from rorqual.engine import Engine
from rorqual.engine.async_engine import MAX_FAILED_STEPS
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
LONG = HELLO | {"max_tokens": 1500, "stream": True, "logit_bias": {"1": -100}}
BROKEN = """
import sys
import rorqual.engine.engine as engine
def fail(self): raise RuntimeError("the device is gone")
engine.Engine.step = fail
from rorqual.cli.main import main
main()
"""


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer, max_batch=2)


def serving(engine: Engine, failed_seconds: float) -> object:
    settings = ServerSettings(failed_seconds=failed_seconds)
    return running(create_app(*serve_engine(engine), settings))


def events(response: httpx.Response) -> Iterator[dict[str, object]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_a_dead_engine_is_told_to_everybody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that run get an error event, those that wait an error, health checks a 503."""
    with serving(engine, failed_seconds=3600) as live, ThreadPoolExecutor(4) as pool:  # type: ignore[attr-defined]
        with web.stream("POST", live.url + CHAT, json=LONG) as response:
            stream = events(response)
            assert "choices" in next(stream)
            have_asked = threading.Event()

            def fail() -> None:
                assert have_asked.wait(HANG_SECONDS)
                raise SystemExit("the thread ends")

            monkeypatch.setattr(engine, "step", fail)
            running_ones = [pool.submit(ask, live, LONG) for _ in range(2)]
            wait_until(lambda: live.app.state.service.num_in_flight == 3)
            have_asked.set()
            last = list(stream)[-1]
        assert last["error"]["code"] in ("internal_error", "engine_failed")  # type: ignore[index]
        for one in running_ones:
            assert "error" in one.result()
        wait_until(lambda: web.get(live.url + "/health").status_code == 503)
        for path in ("/health", "/ready"):
            told = web.get(live.url + path)
            assert told.status_code == 503
            assert told.json()["error"]["code"] == "engine_failed"
            assert told.json()["error"]["type"] == "server_error"
            assert "restart" in told.json()["error"]["message"]
        refused = web.post(live.url + CHAT, json=HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
        assert web.get(live.url + "/metrics").status_code == 200
        wait_until(lambda: live.notices != [])
        assert "restart the server" in live.notices[0]


def ask(live: Live, body: dict[str, object]) -> str:
    return web.post(live.url + CHAT, json=body).text


def test_one_bad_step_is_survived_and_many_end_the_server(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(engine, failed_seconds=0.5) as live:  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", lambda: 1 // 0)
            failed = web.post(live.url + CHAT, json=HELLO)
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
        assert web.get(live.url + "/health").status_code == 200
        assert web.post(live.url + CHAT, json=HELLO | {"max_tokens": 3}).status_code == 200
        monkeypatch.setattr(engine, "step", lambda: 1 // 0)
        for _ in range(MAX_FAILED_STEPS):
            assert web.post(live.url + CHAT, json=HELLO).status_code == 500
        wait_until(lambda: live.has_ended)
        assert live.server.failure is not None


@contextmanager
def process(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the bundled model and its address."""
    flags = ["serve", "--port", "0", "--threads", "1", "--set", "server.failed_seconds=0.2"]
    started = subprocess.Popen(
        [sys.executable, *command, *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(HANG_SECONDS, started.kill)
    killer.start()
    try:
        assert started.stderr is not None
        lines = [started.stderr.readline() for _ in range(5)]  # the first: what it loads
        address = re.search(r"http://127\.0\.0\.1:\d+", lines[1])
        assert address is not None, lines
        wait_until(lambda: is_ready(address[0]))
        yield started, address[0]
    finally:
        killer.cancel()
        started.kill()
        started.communicate()


def is_ready(address: str) -> bool:
    try:
        return web.get(address + "/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_a_process_with_a_dead_engine_ends_with_1() -> None:
    with process("-c", BROKEN) as (server, address):
        for _ in range(MAX_FAILED_STEPS):
            assert web.post(address + CHAT, json=HELLO).status_code == 500
        assert server.wait(HANG_SECONDS) == 1
        assert server.stderr is not None
        told = server.stderr.read()
    assert "the device is gone" in told, "the log says what it was"
    assert "restart the server" in told


def test_sigterm_in_the_middle_of_a_load() -> None:
    """What runs or waits in the queue comes to its end, what comes later is refused; exit 0."""
    body = {"prompt": "The", "max_tokens": 100, "stream": True, "logit_bias": {"2": -100}}
    ends: list[str] = []
    has_begun = threading.Semaphore(0)

    def client(address: str) -> None:
        """Asks until it is refused."""
        while True:
            try:
                with web.stream("POST", address + "/v1/completions", json=body) as response:
                    has_begun.release()
                    response.read()
                    ends.append("whole" if response.text.endswith("[DONE]\n\n") else response.text)
                    if response.status_code == 503:
                        ends[-1] = "refused"
                        return
            except httpx.ConnectError:
                return

    with process("-m", "rorqual") as (server, address), ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(client, address) for _ in range(12)]
        for _ in range(20):
            assert has_begun.acquire(timeout=HANG_SECONDS)
        server.send_signal(signal.SIGTERM)
        for one in clients:
            one.result(HANG_SECONDS)
        assert server.wait(HANG_SECONDS) == 0
    assert set(ends) <= {"whole", "refused"}, ends
    assert ends.count("whole") >= 12
