"""A batch survives kill -9: each line is answered exactly once in the end.

Oracle: the input file. Each line asks for an answer of a length of its own, so that an answer in
the wrong place would show.
"""

from __future__ import annotations

import io
import json
import random
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import web
from killed_servers import HELD, Moment, servers
from openai import APIConnectionError, OpenAI

from patience import HANG_SECONDS, wait_until

pytestmark = pytest.mark.concurrency

CHAT = "/v1/chat/completions"
LENGTHS, FAULTY = 5, 7


def client_of(address: str) -> OpenAI:
    def is_ready() -> bool:
        try:
            return web.get(address + "/ready").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(is_ready)
    return OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=HANG_SECONDS)


def line(number: int) -> bytes:
    """The body of every seventh is faulty: its answer is an error."""
    body = {
        "messages": [{"role": "user", "content": "count up"}],
        "max_tokens": 1 + number % LENGTHS,
        "temperature": 9 if number % FAULTY == 0 else 0,
    }
    request = {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
    return json.dumps(request).encode() + b"\n"


def begin(client: OpenAI, num_lines: int) -> str:
    """The batch's id."""
    content = io.BytesIO(b"".join(line(number) for number in range(num_lines)))
    file_id = client.files.create(file=("in.jsonl", content), purpose="batch").id
    return client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id


def check_survival(state: Path, num_lines: int, moments: Sequence[Moment]) -> None:
    with servers(state) as row:
        batch_id = begin(client_of(row.start(HELD)), num_lines)
        row.send(signal.SIGKILL)
        assert row.ended() == signal.SIGKILL
        for moment in moments:
            row.start(moment)
            assert row.ended() == signal.SIGKILL
        check_end(client_of(row.start()), batch_id, num_lines, state)
        row.send(signal.SIGTERM)
        assert row.ended() == 0


def check_end(client: OpenAI, batch_id: str, num_lines: int, state: Path) -> None:
    """Each line is answered once, in its place, and nothing else is left."""
    wait_until(lambda: client.batches.retrieve(batch_id).status == "completed")
    batch = client.batches.retrieve(batch_id)
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    good, bad = (
        [json.loads(text) for text in client.files.content(each).text.splitlines()]
        for each in (batch.output_file_id, batch.error_file_id)
    )
    numbers = range(num_lines)
    assert [int(each["custom_id"]) for each in good] == [n for n in numbers if n % FAULTY]
    assert [int(each["custom_id"]) for each in bad] == [n for n in numbers if n % FAULTY == 0]
    for record in good:
        usage = record["response"]["body"]["usage"]
        assert usage["completion_tokens"] == 1 + int(record["custom_id"]) % LENGTHS
    assert {record["response"]["status_code"] for record in bad} == {422}
    assert batch.request_counts is not None
    assert batch.request_counts.completed == len(good)
    assert batch.request_counts.failed == len(bad)
    files = {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    assert {file.id for file in client.files.list()} == files
    assert {path.name for path in (state / "files").iterdir()} == files


def test_a_batch_survives_kill_9(tmp_path: Path) -> None:
    """Before an answer is committed, after one, while its file is written and as it ends."""
    moments = [("answer", 4), ("commit", 12), ("file", 9), ("show", 2), ("forget", 1)]
    check_survival(tmp_path / "state", 40, moments)


@pytest.mark.slow
def test_a_batch_of_600_lines_survives_20_kills(tmp_path: Path) -> None:
    """Also right after the start, before a line is answered."""
    draw = random.Random(0)
    moments: list[Moment] = []
    for _ in range(7):
        moments += [("answer", draw.randint(1, 60)), ("commit", draw.randint(1, 40))]
    moments += [("file", 1), ("file", 300), ("file", 600), ("show", 2), ("forget", 1)]
    assert len(moments) == 19  # and one before the first answer
    check_survival(tmp_path / "state", 600, moments)


@pytest.mark.slow
def test_a_living_server_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    """The killed one comes back meanwhile; the batch has one server at any time."""
    state = tmp_path / "state"
    with servers(state) as first, servers(state) as second:
        living = client_of(second.start())
        client = client_of(first.start(("answer", 60)))
        with suppress(APIConnectionError):  # it may be gone before its reply
            begin(client, 200)
        assert first.ended() == signal.SIGKILL
        [batch] = living.batches.list()
        client = client_of(first.start())
        check_end(living, batch.id, 200, state)
        assert client.batches.retrieve(batch.id) == living.batches.retrieve(batch.id)
