"""Ctrl-C while a grammar is tried in its helper process. Oracle: the exit status that docs/api.md
names, and the system's list of processes.
"""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from command import start
from serving import serving

from patience import HANG_SECONDS, is_there, wait_until

pytest.importorskip("llguidance")
pytestmark = [
    pytest.mark.concurrency,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes"),
]

ENDLESS = {"anyOf": [{"type": "integer", "multipleOf": 99991 - i} for i in range(60)]}
"""Minutes in 3,000 characters."""
BODY = {
    "messages": [{"role": "user", "content": "x"}],
    "response_format": {"type": "json_schema", "json_schema": {"schema": ENDLESS}},
}
FOR_EVER = """
from rorqual.engine import grammar_trial
grammar_trial.MAX_SECONDS = 500
"""


def helpers(server: int) -> list[int]:
    """The processes that try grammars for a server, or did so and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == server and b"grammar_helper.py" in command:
            found.append(int(path.name))
    return found


@pytest.mark.parametrize("num_signals", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_server_that_tries_a_grammar_ends_and_leaves_no_process(
    model_folder: Path, num_signals: int
) -> None:
    """The first signal waits for the trial, whose time is bounded; a second one does not wait."""
    setup = FOR_EVER if num_signals == 2 else ""
    flags = ("--cache-memory", "64MiB")
    with (
        serving(model_folder, *flags, setup=setup) as (process, address),
        ThreadPoolExecutor(1) as pool,
    ):
        url = address + "/v1/chat/completions"
        asked = pool.submit(httpx.post, url, json=BODY, timeout=HANG_SECONDS)
        wait_until(lambda: helpers(process.pid))
        tried = helpers(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while b"Finishing 1 requests" not in process.stderr.readline():
            assert process.poll() is None
        if num_signals == 2:
            process.send_signal(signal.SIGINT)
            assert process.wait(HANG_SECONDS) == 1
            with pytest.raises(httpx.TransportError):
                asked.result(HANG_SECONDS)
        else:
            reply = asked.result(HANG_SECONDS)
            assert reply.status_code == 400
            assert json.loads(reply.text)["error"]["code"] == "invalid_grammar"
            assert process.wait(HANG_SECONDS) == 0
            assert b"Traceback" not in process.stderr.read()
        wait_until(lambda: not any(map(is_there, tried)))


def test_generate_ends_too_and_leaves_no_process(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(BODY) + "\n", encoding="utf-8")
    started = start("generate", "--model", model_folder, "--input-file", source, setup=FOR_EVER)
    wait_until(lambda: helpers(started.pid))
    tried = helpers(started.pid)
    started.send_signal(signal.SIGINT)
    err = started.communicate(timeout=HANG_SECONDS)[1].decode()
    assert started.returncode == 130, err
    assert "Traceback" not in err
    wait_until(lambda: not any(map(is_there, tried)))
