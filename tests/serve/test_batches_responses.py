"""`/v1/responses` in batches, through the official client. Oracles: the route itself, whose replies
the lines' are, and the store, which has them afterwards.
"""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from batch_stage import Stage, Stages
from live import Live
from openai import OpenAI

from patience import wait_until
from rorqual.serve import batch_job
from rorqual.serve.schemas_batches import BatchReply, BatchRequest
from rorqual.serve.store import LostError, NewFile, StorageError

ROUTE = "/v1/responses"


def line(custom_id: str, body: dict[str, Any]) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ROUTE, "body": body})


def run(client: OpenAI, bodies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The lines' records by their names."""
    text = "\n".join(line(name, body) for name, body in bodies.items())
    file = client.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ROUTE, completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    batch = client.batches.retrieve(batch.id)
    records = {}
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            for each in client.files.content(file_id).text.splitlines():
                record = json.loads(each)
                records[record["custom_id"]] = record["response"]
    return records


def plain(body: dict[str, Any]) -> Any:
    """Without what differs from one request to the next."""
    drop = ("id", "call_id", "created_at", "completed_at", "usage", "previous_response_id")

    def without(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in drop}

    return without(body) | {"output": [without(item) for item in body["output"]]}


@pytest.mark.concurrency
def test_lines_are_what_the_route_says(live: Live, client: OpenAI) -> None:
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    bodies: dict[str, dict[str, Any]] = {
        "text": {"input": "hello", "instructions": "Be brief.", "metadata": {"a": "b"}},
        "items": {"input": [{"role": "user", "content": "count up"}], "max_output_tokens": 20},
        "calls": {"input": "call two", "tools": [tool], "tool_choice": "required"},
        "json": {"input": "whole json", "text": {"format": schema}, "store": False},
        "thought": {"input": "think first", "reasoning": {"effort": "high"}, "top_p": 0.5},
    }
    records = run(client, bodies)
    assert records.keys() == bodies.keys()
    for name, body in bodies.items():
        assert records[name]["status_code"] == 200, records[name]
        reply = records[name]["body"]
        own = client.responses.create(model="sei", **body)
        assert plain(reply) == plain(own.to_dict()), name
        if body.get("store") is not False:
            assert client.responses.retrieve(reply["id"]).to_dict() == reply
    first = records["text"]["body"]["id"]
    follow = {"input": "hello", "previous_response_id": first, "colour": "red"}
    faults = {
        "stream": {"input": "hello", "stream": True},
        "background": {"input": "hello", "background": True},
        "lost": {"input": "hello", "previous_response_id": "resp_0"},
        "empty": {},
    }
    records = run(client, faults | {"follow": follow})
    assert records["follow"]["body"]["previous_response_id"] == first
    assert records["follow"]["ignored_fields"] == ["colour"]
    params = ("stream", "background", "previous_response_id", "input")
    for name, param in zip(faults, params, strict=True):
        assert records[name]["status_code"] >= 400
        assert records[name]["body"]["error"]["param"] == param


def test_a_full_disk_costs_no_second_answer(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch waits and stores what it has, for whom the batch belongs to."""
    monkeypatch.setattr(batch_job, "STORAGE_SECONDS", 0)

    async def work() -> None:
        stage = stages(1)
        store, engine = stage.store.responses, stage.service.engine
        put, num_failures = store.put, 3

        async def fail_first(response: Any) -> None:
            nonlocal num_failures
            if num_failures:
                num_failures -= 1
                raise StorageError(503, "the server's disk is full", code="disk_full")
            await put(response)

        monkeypatch.setattr(store, "put", fail_first)
        reply = await answered(stage)
        assert (reply.status, reply.request_counts.completed) == ("completed", 1)
        (record,) = stage.records(reply.output_file_id)
        assert (await store.get(record["response"]["body"]["id"], "me")).owner == "me"
        assert (len(engine.requests), num_failures) == (1, 0)  # type: ignore[attr-defined]

    asyncio.run(work())


@pytest.mark.parametrize("seconds", [None, 12_345.0])
def test_the_time_limit_ends_with_the_answer(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    """A full disk takes longer than any limit: the line is answered, not a 504."""
    monkeypatch.setattr(batch_job, "STORAGE_SECONDS", 0)
    clocks: list[asyncio.Timeout] = []
    make = asyncio.timeout

    def timeout(delay: float | None) -> asyncio.Timeout:
        clock = make(delay)
        if delay == seconds:
            clocks.append(clock)
        return clock

    async def work() -> None:
        stage = stages(1, request_timeout_seconds=seconds)
        store, num_failures = stage.store.responses, 10
        put = store.put

        async def fail_first(response: Any) -> None:
            nonlocal num_failures
            if any(clock.when() is not None for clock in clocks):  # the limit has passed
                clocks[-1].reschedule(asyncio.get_running_loop().time())
            if num_failures:
                num_failures -= 1
                raise StorageError(503, "the server's disk is full", code="disk_full")
            await put(response)

        monkeypatch.setattr(store, "put", fail_first)
        monkeypatch.setattr(asyncio, "timeout", timeout)
        reply = await answered(stage)
        assert (reply.status, reply.request_counts.completed) == ("completed", 1)
        assert num_failures == 0

    asyncio.run(work())


def test_a_batch_that_another_server_has_is_no_fault(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        stage = stages(1)

        async def lose(response: Any) -> None:
            raise LostError

        monkeypatch.setattr(stage.store.responses, "put", lose)
        assert (await answered(stage)).status == "in_progress"

    asyncio.run(work())
    assert [record.exc_info for record in caplog.records] == [None]
    assert "has another server" in caplog.text


async def answered(stage: Stage) -> BatchReply:
    """A batch of one line when nothing runs any more."""
    content = line("a", {"input": "hello"}).encode()
    file = await stage.files.add([content], len(content), NewFile(name="in.jsonl", owner="me"))
    request = BatchRequest(input_file_id=file.id, endpoint=ROUTE)
    return await stage.ended((await stage.batches.create(request, "me")).id)
