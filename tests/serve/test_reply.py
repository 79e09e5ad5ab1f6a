"""How an answer is sent, without a server. Oracle: the messages of ASGI, by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from served import make_model
from test_serve_metrics import EMPTY, samples

from rorqual.engine import EngineOverloaded, Grammar, Piece, Request, SamplingParams, Usage
from rorqual.errors import UsageError
from rorqual.serve.errors import ApiError
from rorqual.serve.reply import AnswerResponse, event
from rorqual.serve.sampling import sampling_params
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

SILENCE = "silence"
KEEP_ALIVE_SECONDS = 3600.0
"""Passes only when a test moves the clock."""
END = Piece("é", (2,), finish_reason="stop", usage=Usage(1, 0, 1))


class Script:
    """An engine whose one answer is a list of pieces, silences and faults."""

    failure = None

    def __init__(self, *items: Any) -> None:
        self.items, self.hush = items, asyncio.Event()

    def stats(self) -> Any:
        return EMPTY

    def most_at_once(self, request: Request) -> int:
        return 1000

    async def submit(self, request: Request) -> AsyncIterator[Piece]:
        for item in self.items:
            if item == SILENCE:
                await _pass_time()
                await self.hush.wait()
                self.hush.clear()
            elif isinstance(item, Exception):
                raise item
            else:
                yield item


async def _pass_time() -> None:
    """Until the next sign of life is due; first whoever waits for it begins to."""
    for _ in range(20):
        await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    clock = loop.time
    loop.time = lambda: clock() + KEEP_ALIVE_SECONDS  # type: ignore[method-assign]


class Texts:
    """An assembler that shows each piece's text."""

    def __init__(self) -> None:
        self.said = ""

    def put(self, index: int, piece: Piece) -> list[str]:
        self.said += piece.text
        return [piece.text]

    def last(self) -> list[str]:
        return ["last"]

    def whole(self) -> str:
        return json.dumps(self.said, ensure_ascii=False)


class Client:
    """Takes what is sent; a sign of life ends the engine's silence."""

    def __init__(self, script: Script, *, leaves_after: int | None = None) -> None:
        self.script, self.sent = script, list[Any]()
        self.leaves_after, self.has_left = leaves_after, asyncio.Event()

    async def receive(self) -> Any:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if len(self.sent) == self.leaves_after:
            self.has_left.set()
        if message.get("body") in (b"\n", b": keep-alive\n\n"):
            self.script.hush.set()

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


def answered(
    tokenizer: Tokenizer,
    *items: Any,
    is_stream: bool,
    params: SamplingParams | None = None,
    leaves_after: int | None = None,
) -> tuple[Client, dict[str, float]]:
    async def run() -> tuple[Client, dict[str, float]]:
        script = Script(*items)
        settings = ServerSettings(keep_alive_seconds=KEEP_ALIVE_SECONDS)
        service = Service(script, make_model(tokenizer), settings)  # type: ignore[arg-type]
        requests: Sequence[Request] = [Request([5], params or SamplingParams())]
        response = AnswerResponse(service, requests, Texts(), is_stream=is_stream)
        client = Client(script, leaves_after=leaves_after)
        await response({"type": "http"}, client.receive, client.send)
        return client, samples(service.metrics.text().decode())

    return asyncio.run(run())


def going(text: str) -> Piece:
    return Piece(text, (1,))


def test_a_whole_reply_says_how_long_it_is(tokenizer: Tokenizer) -> None:
    client, counts = answered(tokenizer, going("a"), END, is_stream=False)
    body = '"aé"'.encode()
    assert client.bodies == [body]
    assert client.headers == {
        b"content-type": b"application/json",
        b"cache-control": b"no-cache",
        b"content-length": str(len(body)).encode(),
    }
    assert client.sent[-1]["more_body"] is False
    assert counts["rorqual_client_disconnects_total"] == 0


def test_a_whole_reply_that_began_early_does_not(tokenizer: Tokenizer) -> None:
    client, _ = answered(tokenizer, SILENCE, going("a"), SILENCE, END, is_stream=False)
    assert client.bodies == [b"\n", b"\n", '"aé"'.encode()]
    assert b"content-length" not in client.headers
    assert [message["more_body"] for message in client.sent[1:]] == [True, True, False]


def test_a_stream_and_its_signs_of_life(tokenizer: Tokenizer) -> None:
    client, _ = answered(tokenizer, SILENCE, going("a"), SILENCE, END, is_stream=True)
    assert client.headers == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    alive = b": keep-alive\n\n"
    ends = [b"data: last\n\ndata: [DONE]\n\n"]
    assert client.bodies == [alive, b"data: a\n\n", alive, "data: é\n\n".encode(), *ends]
    assert [message["more_body"] for message in client.sent[1:]] == [True] * 4 + [False]


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_fault_before_the_first_byte_has_its_own_status(
    tokenizer: Tokenizer, is_stream: bool
) -> None:
    with pytest.raises(ApiError) as caught:
        answered(tokenizer, EngineOverloaded("full"), is_stream=is_stream)
    assert caught.value.status == 429
    with pytest.raises(ZeroDivisionError):
        answered(tokenizer, ZeroDivisionError(), is_stream=is_stream)
    grammar = SamplingParams(grammar=Grammar("regex", "("))
    for params, param in ((grammar, "response_format"), (None, None)):
        with pytest.raises(ApiError) as caught:
            answered(tokenizer, UsageError("bad"), is_stream=is_stream, params=params)
        assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("problem", "code"),
    [(EngineOverloaded("full"), "queue_full"), (ZeroDivisionError("secret"), "internal_error")],
)
def test_a_fault_after_it_is_told_in_the_body(
    tokenizer: Tokenizer, problem: Exception, code: str
) -> None:
    client, _ = answered(tokenizer, SILENCE, going("a"), problem, is_stream=True)
    last = client.bodies[-1]
    assert last.startswith(b"data: {")
    assert last.endswith(b"}\n\n")
    assert json.loads(last[6:])["error"]["code"] == code
    assert b"secret" not in last
    assert client.sent[-1]["more_body"] is False
    whole, _ = answered(tokenizer, SILENCE, problem, is_stream=False)
    assert json.loads(b"".join(whole.bodies))["error"]["code"] == code
    assert whole.sent[0]["status"] == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_is_counted_once(tokenizer: Tokenizer, is_stream: bool) -> None:
    items = [SILENCE, going("a"), *[SILENCE] * 50, END]
    client, counts = answered(tokenizer, *items, is_stream=is_stream, leaves_after=2)
    assert counts["rorqual_client_disconnects_total"] == 1
    assert counts["rorqual_answers_total reason=cancelled"] == 1
    assert len(client.sent) >= 2
    assert client.sent[-1]["more_body"] is True


def test_events_hide_the_line_ends_of_unicode() -> None:
    assert event('"a\u2028b\u2029c\u0085d"') == b'data: "a\\u2028b\\u2029c\\u0085d"\n\n'


def test_every_field_becomes_a_parameter() -> None:
    body = CompletionRequest.model_validate(
        {"prompt": "a", "stop": ["x", "y"], "logit_bias": {"7": 2}, "seed": 0, "temperature": 0}
    )
    advice = SamplingParams(temperature=0.5, seed=9, stop=("z",), ignore_eos=True)
    params = sampling_params(body, advice, max_tokens=None, logprobs=0, prompt_logprobs=2)
    assert (params.temperature, params.seed, params.stop) == (0, 0, ("x", "y"))
    assert dict(params.logit_bias or {}) == {7: 2}
    assert (params.logprobs, params.prompt_logprobs, params.ignore_eos) == (0, 2, True)
    kept = sampling_params(CompletionRequest(prompt="a"), advice, max_tokens=None)
    assert (kept.seed, kept.stop, kept.logprobs) == (9, ("z",), None)
    with pytest.raises(ApiError) as caught:
        sampling_params(body, advice, max_tokens=None, grammar=Grammar("regex", "a"))
    assert (caught.value.status, caught.value.code) == (422, "invalid_value")
    assert "\n" not in caught.value.message
