"""From messages to prompts, and the service's parts alone. Oracle: docs/api.md, by hand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from served import make_model
from test_serve_metrics import EMPTY, samples

from rorqual.engine import (
    AnswerClosed,
    EngineFailed,
    EngineOverloaded,
    Piece,
    Request,
    SamplingParams,
    Usage,
)
from rorqual.errors import RorqualError, UsageError
from rorqual.serve.answers import Answers
from rorqual.serve.errors import ApiError
from rorqual.serve.metrics import EndReason, Metrics
from rorqual.serve.prompts import chat_messages, chat_tools, check_ids, fim_prompt
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.server import address_of, is_loopback, open_socket
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

REASONS = get_args(EndReason)

# Prompts


def chat(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": list(messages), **fields})


def called(*ids: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": i, "type": "function", "function": function} for i in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def output(call_id: str, text: str = "x") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ((called("a"), output("a"), output("a")), 2),
        ((called("a", "b"), output("b"), output("c")), 2),
        ((called("a"), USER, output("a")), 2),
        ((called("a"), called("b"), output("a")), 2),
        ((called("a"), output("a"), USER, output("a")), 3),
        ((output("a"), called("a")), 0),
    ],
)
def test_outputs_that_belong_to_no_call(messages: Any, place: int) -> None:
    with pytest.raises(ApiError) as caught:
        chat_messages(chat(*messages))
    assert caught.value.status == 400
    assert caught.value.param == f"messages[{place}].tool_call_id"


def test_outputs_stand_behind_their_own_calls() -> None:
    """In two rounds, the second with ids of the first; one call has no output."""
    messages = chat_messages(
        chat(
            called("a", "b", "c"),
            output("c", "1"),
            output("a", "2"),
            called("b", "a"),
            output("a", "3"),
            output("b", "4"),
            USER,
        )
    )
    assert [message["content"] for message in messages] == ["", "2", "1", "", "4", "3", "hello"]


@pytest.mark.parametrize(
    ("last", "content"),
    [
        ({"content": "It", "prefix": True}, "It"),
        ({"content": "It", "prefix": True, "reasoning_content": "Hm"}, "It"),
        ({"content": "", "prefix": True, "reasoning_content": "Hm"}, ""),
        ({"prefix": True, "reasoning_content": "Hm"}, ""),
        ({"content": "It", "prefix": True, "reasoning_content": ""}, "It"),
        ({"prefix": True}, ""),
        ({"content": "It", "prefix": False, "reasoning_content": "Hm"}, "It"),
        ({"content": "It", "reasoning_content": "Hm"}, "It"),
    ],
)
def test_what_an_answer_is_continued_from(last: dict[str, Any], content: str) -> None:
    rendered = chat_messages(chat(USER, {"role": "assistant", **last}))[-1]
    assert rendered["content"] == content
    assert rendered.get("prefix", False) == bool(last.get("prefix"))
    assert rendered.get("reasoning_content") == last.get("reasoning_content")  # the template's
    early = chat_messages(chat({"role": "assistant", **last}, USER))[0]
    assert early["content"] in (last.get("content"), last.get("content") or "")


def test_tools_are_shown_as_they_are_but_for_strict() -> None:
    strict = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    tools = [{"type": "function", "function": strict}]
    shown = {"name": "f", "parameters": {"type": "object"}}
    assert chat_tools(chat(USER, tools=tools)) == [{"type": "function", "function": shown}]
    assert chat_tools(chat(USER, tools=tools, tool_choice="none")) is None
    assert chat_tools(chat(USER, tools=[])) is None


def test_ids_are_those_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    check_ids([0, last], tokenizer)
    with pytest.raises(RorqualError, match=f"{last + 1}.*\n.*0 to {last}"):
        check_ids([0, last + 1, last], tokenizer)


@pytest.mark.parametrize("missing", ["fim_begin_id", "fim_hole_id", "fim_end_id"])
def test_the_middle_is_filled_only_with_all_three_tokens(missing: str) -> None:
    ids = {"bos_id": 0, "fim_begin_id": 1, "fim_hole_id": 0, "fim_end_id": 3}
    known: Any = SimpleNamespace(**ids)
    assert fim_prompt([7, 8], [9], known) == [0, 1, 7, 8, 0, 9, 3]
    with pytest.raises(ApiError) as caught:
        fim_prompt([7], [9], SimpleNamespace(**ids | {missing: None}))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.param) == (400, "suffix")


# The service and its socket


def bound(host: str) -> Any:
    return SimpleNamespace(getsockname=lambda: (host, 80, 0, 0))


@pytest.mark.parametrize(
    ("host", "address", "is_own"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", True),
        ("127.1.2.3", "http://127.1.2.3:80", True),
        ("::1", "http://[::1]:80", True),
        ("0.0.0.0", "http://127.0.0.1:80", False),
        ("::", "http://[::1]:80", False),
        ("12.7.0.1", "http://12.7.0.1:80", False),
        ("fe80::2", "http://[fe80::2]:80", False),
    ],
)
def test_addresses(host: str, address: str, is_own: bool) -> None:
    assert address_of(bound(host)) == address
    assert is_loopback(bound(host)) == is_own


def test_a_port_in_use() -> None:
    with open_socket("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match="cannot listen") as caught:
            open_socket("127.0.0.1", port)
        assert caught.value.where == f"127.0.0.1:{port}"
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_what_the_engine_says_is_told_by_its_kind(tokenizer: Tokenizer) -> None:
    engine: Any = SimpleNamespace(stats=lambda: EMPTY)
    service = Service(engine, make_model(tokenizer), ServerSettings(retry_after_seconds=9))

    def told(problem: BaseException) -> tuple[int, str | None] | None:
        error = service.api_error(problem)
        return error and (error.status, error.code)

    busy = EngineOverloaded("too many")
    assert told(busy) == (429, "queue_full")
    assert service.api_error(busy).headers["retry-after"] == "9"  # type: ignore[union-attr]
    service.is_draining = True
    assert told(busy) == (503, "overloaded")
    assert told(EngineFailed("gone", fix="restart")) == (503, "engine_failed")
    assert told(UsageError("wrong")) == (400, "invalid_request")
    assert told(ApiError(418, "tea", code="pot")) == (418, "pot")
    assert told(ValueError("bug")) is None
    for name in ("sei", "minke", None):
        service.check_model(name)
    with pytest.raises(ApiError):
        service.check_model("")


# Answers


class Streams:
    """An engine whose answers say what a test chose: pieces, or what is raised."""

    def __init__(self, *answers: Sequence[Piece | Exception]) -> None:
        self.answers = list(answers)
        self.num_closed = 0

    def most_at_once(self, request: Request) -> int:
        return 1000

    async def submit(self, request: Request) -> AsyncIterator[Piece]:
        try:
            for item in self.answers[request.prompt_ids[0]]:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.num_closed += 1


def going(text: str) -> Piece:
    return Piece(text, (1,))


def ended(text: str) -> Piece:
    return Piece(text, (1,), finish_reason="stop", usage=Usage(1, 0, 1))


async def all_of(streams: Streams, metrics: Metrics) -> tuple[dict[int, str], Exception | None]:
    requests = [Request([n], SamplingParams()) for n in range(len(streams.answers))]
    texts: dict[int, str] = {}
    async with Answers(streams, requests, metrics) as answers:  # type: ignore[arg-type]
        try:
            while events := await answers.next(None):
                for index, piece in events:
                    texts[index] = texts.get(index, "") + piece.text
        except (ValueError, EngineOverloaded) as problem:
            with pytest.raises(type(problem)):  # again, whoever asks again
                await answers.next(None)
            return texts, problem
        assert await answers.next(None) == []
    return texts, None


@pytest.mark.parametrize(
    ("answers", "texts", "problem", "ends"),
    [
        ([[going("a"), ended("b")], [ended("c")]], {0: "ab", 1: "c"}, None, {"stop": 2}),
        ([[going("a"), ValueError()]], {0: "a"}, ValueError, {"failed": 1}),
        ([[EngineOverloaded("full")]], {}, EngineOverloaded, {"refused": 1}),
        ([[AnswerClosed("closed")]], {}, AnswerClosed, {"closed": 1}),
        # The engine was closed under it: what has no end is not complete.
        ([[going("a")]], {0: "a"}, AnswerClosed, {"closed": 1}),
        ([[]], {}, AnswerClosed, {"closed": 1}),
        ([], {}, None, {}),
    ],
)
def test_answers_are_merged_and_told_of_their_ends(
    answers: Any, texts: dict[int, str], problem: type[Exception] | None, ends: dict[str, int]
) -> None:
    metrics, streams = Metrics(lambda: EMPTY), Streams(*answers)
    got, raised = asyncio.run(all_of(streams, metrics))
    assert got == texts
    assert (None if raised is None else type(raised)) is problem
    assert streams.num_closed == len(answers)
    counts = samples(metrics.text().decode())
    told = {reason: counts[f"rorqual_answers_total reason={reason}"] for reason in REASONS}
    assert {reason: count for reason, count in told.items() if count} == ends
    num_first = counts["rorqual_time_to_first_token_seconds_count"]
    assert num_first == len(texts)


def test_whoever_leaves_closes_what_runs_and_a_wait_has_an_end() -> None:
    class Endless(Streams):
        def most_at_once(self, request: Request) -> int:
            return 1000

        async def submit(self, request: Request) -> AsyncIterator[Piece]:
            try:
                yield going("a")
                await asyncio.Event().wait()
            finally:
                self.num_closed += 1

    async def test() -> None:
        streams, metrics = Endless([], []), Metrics(lambda: EMPTY)
        requests = [Request([n], SamplingParams()) for n in range(2)]
        async with Answers(streams, requests, metrics) as answers:  # type: ignore[arg-type]
            events: list[Any] = []
            while len(events) < 2:
                events += await answers.next(None) or []
            assert sorted(index for index, _ in events) == [0, 1]
            assert await answers.next(0) is None
            assert streams.num_closed == 0
        assert streams.num_closed == 2
        counts = samples(metrics.text().decode())
        assert counts["rorqual_answers_total reason=cancelled"] == 2

    asyncio.run(test())


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (ValueError(), "failed"),
        (EngineOverloaded("full"), "refused"),
        (AnswerClosed("x"), "closed"),
    ],
)
def test_those_that_end_with_one_that_failed_are_no_cancellations(
    problem: Exception, reason: str
) -> None:
    class Endless(Streams):
        def most_at_once(self, request: Request) -> int:
            return 1000

        async def submit(self, request: Request) -> AsyncIterator[Piece]:
            if request.prompt_ids[0]:
                raise problem
            yield going("a")
            await asyncio.Event().wait()

    async def test() -> None:
        metrics = Metrics(lambda: EMPTY)
        _, raised = await all_of(Endless([], []), metrics)
        assert raised is problem
        counts = samples(metrics.text().decode())
        assert counts[f"rorqual_answers_total reason={reason}"] == 2
        assert counts["rorqual_answers_total reason=cancelled"] == 0

    asyncio.run(test())


def test_what_came_before_a_fault_is_told_before_it() -> None:
    """Also where both have come when somebody asks."""

    async def test() -> None:
        streams, metrics = Streams([going("a"), going("b"), ValueError()]), Metrics(lambda: EMPTY)
        requests = [Request([0], SamplingParams())]
        async with Answers(streams, requests, metrics) as answers:  # type: ignore[arg-type]
            while not answers._tasks[0].done():
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            events = await answers.next(None)
            assert [piece.text for _, piece in events or []] == ["a", "b"]
            with pytest.raises(ValueError):
                await answers.next(None)

    asyncio.run(test())
