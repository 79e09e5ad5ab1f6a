"""`rorqual serve` as a program: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest
from command import ENVIRONMENT, run
from openai import OpenAI
from serving import serving

from patience import HANG_SECONDS
from rorqual.cli.engine_flags import parse_memory
from rorqual.cli.serve import _state_folder
from rorqual.errors import UsageError
from rorqual.serve.auth import check_origins

pytestmark = pytest.mark.concurrency

# Holds the engine after its first steps: till the server drains, or for ever.
HELD = """
import threading
from rorqual.engine import Engine
from rorqual.serve.server import Server
step, begin_drain, drains = Engine.step, Server.begin_drain, threading.Event()
num_left = 8
def held_step(self):
    global num_left
    num_left -= 1
    if num_left < 0:
        drains.wait()
    return step(self)
def noted(self):
    {note}
    begin_drain(self)
Engine.step, Server.begin_drain = held_step, noted
"""
NO_NOHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
UNTIL_IT_DRAINS, FOR_EVER = HELD.format(note="drains.set()"), HELD.format(note="pass")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 129)])
def test_a_signal_lets_an_answer_finish(
    model_folder: Path, number: signal.Signals, code: int
) -> None:
    """A closed terminal (SIGHUP) says so twice."""
    flags = ("--cache-memory", "64MiB")
    setup = NO_NOHUP + UNTIL_IT_DRAINS
    with serving(model_folder, *flags, setup=setup) as (process, address):
        client = OpenAI(base_url=address + "/v1", api_key="none", timeout=HANG_SECONDS)
        assert [model.id for model in client.models.list()] == ["sei"]
        stream = client.completions.create(
            model="sei",
            prompt="The whale",
            max_tokens=40,
            logit_bias={"1": -100},
            stream=True,
            stream_options={"include_usage": True},
        )
        first = next(iter(stream))
        assert first.choices
        process.send_signal(number)
        if number == signal.SIGHUP:
            process.send_signal(number)
        last = list(stream)[-1]
        assert last.usage is not None
        assert last.usage.completion_tokens == 40
        assert process.wait(HANG_SECONDS) == code
        assert process.stderr is not None
        assert b"Finishing 1 requests" in process.stderr.read()


def test_a_second_signal_ends_at_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    state = tmp_path / "state"
    with serving(model_folder, "--state-dir", state, setup=FOR_EVER) as (process, address):
        assert (state / "rorqual.db").exists()
        body = {"prompt": "The whale", "logit_bias": {"1": -100}, "stream": True}
        with httpx.stream(
            "POST", address + "/v1/completions", json=body, timeout=HANG_SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            while b"Finishing 1 requests" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG_SECONDS) == 1
    assert list(tmp_path.glob("rorqual-*")) == []


def test_what_it_refuses_before_it_loads_anything(model_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--model", model_folder, "--port", port)
    assert done.code == 2
    assert "cannot listen there" in done.err
    keys = tmp_path / "keys.txt"
    keys.write_text("# none\n")
    for flags, words in (
        (("--set", "server.max_body_byte=5"), "did you mean 'max_body_bytes'"),
        (("--set", "engine.block_tokens=0"), "greater than 0"),
        (("--set", "nonsense=1"), "is unknown"),
        (("--api-key-file", keys), "no key"),
        (("--api-key-file", tmp_path / "nowhere"), "or name another --api-key-file"),
        (("--files-dir", tmp_path), "--files-dir is now --state-dir"),
        (("--state-dir", "/dev/null"), "choose another --state-dir"),
        (("--state-dir", "/dev/null/deeper"), "choose another --state-dir"),
        (("--set", "server.state_dir='/dev/null'"), "choose another --state-dir"),
        (("--served-model-name", ""), "--served-model-name is no name"),
        (("--served-model-name", "a", "--served-model-name", " b"), "is no name"),
        (("--cors-origin", "notaurl"), "--cors-origin is no origin of a page"),
        (("--cors-origin", "notaurl"), "  fix:      take from the page's address"),
        (("--cors-origin", "https://a.example/"), "without a path"),
        (("--cors-origin", "https://A.example"), "in small letters"),
        (("--cache-memory", "much"), "is no size"),
        (("--kv-cache-dtype", "int3"), "int3"),
        (("--host", "256.256.256.256"), "cannot listen there"),
    ):
        done = run("serve", "--model", model_folder, "--port", 0, *flags)
        assert done.code == 2, (flags, done)
        assert words in done.err
        assert "at http://" not in done.err  # no banner
        assert "Traceback" not in done.err


def test_origins_that_browsers_send_are_taken() -> None:
    check_origins(
        ["*", "null", "http://localhost:3000", "https://a.example", "app://x", "http://[::1]:8"]
    )


def test_without_a_home_the_server_keeps_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody chose the default folder, so that it cannot be made is no reason not to serve."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert _state_folder(None) is None
    with pytest.raises(UsageError, match="a part of the path is a file"):
        _state_folder(tmp_path / "file" / "deeper")


def test_sizes() -> None:
    assert parse_memory("2GiB") == 2 * 2**30
    assert parse_memory("500M") == 500_000_000
    assert parse_memory("1.5 kB") == 1500
    assert parse_memory("123456") == 123456
    assert parse_memory("0.5") == 0.5
    for text in ("", "much", "-1G", "0", "5TB", "1e9"):
        with pytest.raises(UsageError):
            parse_memory(text)
