"""`rorqual serve` as a program: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from command import ENVIRONMENT, TIMEOUT_SECONDS, run
from openai import OpenAI
from serving import serving

from rorqual.cli.serve import parse_memory
from rorqual.errors import UsageError

LONG = {"max_tokens": 3000, "logit_bias": {"1": -100}, "stream": True}
AT_ONCE_SECONDS = 20
"""A second signal waits for nothing; what remains is a busy machine's time to end a process."""


def test_sigterm_lets_an_answer_finish(model_folder: Path) -> None:
    with serving(model_folder, "--cache-memory", "64MiB") as (process, address):
        client = OpenAI(base_url=address + "/v1", api_key="none", timeout=TIMEOUT_SECONDS)
        assert [model.id for model in client.models.list()] == ["sei"]
        stream = client.completions.create(
            model="sei",
            prompt="The whale",
            max_tokens=400,
            logit_bias={"1": -100},
            stream=True,
            stream_options={"include_usage": True},
        )
        first = next(iter(stream))
        assert first.choices
        process.send_signal(signal.SIGTERM)
        last = list(stream)[-1]
        assert last.usage is not None
        assert last.usage.completion_tokens == 400
        assert process.wait(TIMEOUT_SECONDS) == 0
        assert process.stderr is not None
        assert b"Finishing 1 requests" in process.stderr.read()


def test_a_second_signal_ends_at_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    with serving(model_folder) as (process, address):
        assert len(list(tmp_path.glob("rorqual-*"))) == 1
        body = LONG | {"prompt": "The whale"}
        with httpx.stream(
            "POST", address + "/v1/completions", json=body, timeout=TIMEOUT_SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            since = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_SECONDS) == 1
            assert time.monotonic() - since < AT_ONCE_SECONDS
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
        (("--cache-memory", "much"), "is no size"),
        (("--kv-cache-dtype", "int3"), "int3"),
        (("--host", "256.256.256.256"), "cannot listen there"),
    ):
        done = run("serve", "--model", model_folder, "--port", 0, *flags)
        assert done.code == 2, (flags, done)
        assert words in done.err


def test_sizes() -> None:
    assert parse_memory("2GiB") == 2 * 2**30
    assert parse_memory("500M") == 500_000_000
    assert parse_memory("1.5 kB") == 1500
    assert parse_memory("123456") == 123456
    assert parse_memory("0.5") == 0.5
    for text in ("", "much", "-1G", "0", "5TB", "1e9"):
        with pytest.raises(UsageError):
            parse_memory(text)
