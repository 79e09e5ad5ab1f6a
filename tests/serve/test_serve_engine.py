"""The server over the real engine and a tiny random model.

Oracle: the engine in process gives the same tokens, the schema library the same verdict, and the
free blocks return to full.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import web
from live import Live, running
from openai import OpenAI
from real import make_engine, serve_engine

from patience import HANG_SECONDS, wait_until
from rorqual.engine import Engine, SamplingParams
from rorqual.serve.app import create_app
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import TOOL_CALLS_END

pytestmark = pytest.mark.concurrency

HELLO: Any = [{"role": "user", "content": "The whale swims in the deep sea, and then"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "time", "parameters": {**CITY, "required": []}}},
]


@pytest.fixture(scope="module")
def real(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer, speculate=1, max_batch=4)


@pytest.fixture(scope="module")
def real_live(real: Engine) -> Iterator[Live]:
    with running(create_app(*serve_engine(real, max_queue=8))) as live:
        yield live


@pytest.fixture(scope="module")
def real_client(real_live: Live) -> OpenAI:
    url = real_live.url + "/v1"
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=HANG_SECONDS)


def test_greedy_text_is_the_engines(
    real_client: OpenAI, real_live: Live, tokenizer: Tokenizer
) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    alone = make_engine(tokenizer).generate([tokenizer.encode_chat(HELLO)], params)[0]
    ask: Any = {"model": "sei", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    whole = real_client.chat.completions.create(**ask)
    streamed = real_client.chat.completions.create(**ask, stream=True)
    assert whole.choices[0].message.content == alone.text
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == alone.text
    assert whole.usage.completion_tokens == len(alone.token_ids)
    again = real_client.chat.completions.create(**ask).usage
    assert again is not None
    assert again.prompt_tokens_details is not None
    assert again.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**64 - 1])
def test_choices_are_the_answers_of_their_own_seeds(
    real_client: OpenAI, seed: int, is_stream: bool
) -> None:
    """Of seed, seed + 1, ..., each asked for alone; after the last seed comes 0 again."""

    def texts(seed: int, n: int, is_stream: bool) -> list[str]:
        found = [""] * n
        ask: Any = {"model": "sei", "prompt": "The whale", "temperature": 1.0, "max_tokens": 12}
        reply = real_client.completions.create(**ask, seed=seed, n=n, stream=is_stream)
        for part in reply if is_stream else [reply]:
            for choice in part.choices:
                found[choice.index] += choice.text
        return found

    together = texts(seed, 3, is_stream)
    alone = [texts((seed + offset) % 2**63, 1, False)[0] for offset in range(3)]
    assert together == alone
    assert len(set(alone)) == 3


def test_seeds_beyond_64_bits_are_refused(real_client: OpenAI) -> None:
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(openai.UnprocessableEntityError, match="seed"):
            real_client.completions.create(model="sei", prompt="a", seed=seed)


def test_logprobs_of_the_prompt_are_those_of_the_answer(
    real_client: OpenAI, tokenizer: Tokenizer
) -> None:
    """What the model said of its own answer, it says of it as a prompt too."""
    prompt = tokenizer.encode("The whale sings", bos=True)
    ask: Any = {"model": "sei", "temperature": 0, "logprobs": 1}
    said = real_client.completions.create(prompt=prompt, max_tokens=6, **ask).choices[0]
    ids = [*prompt, *tokenizer.encode("the sea")]
    scored = real_client.completions.create(prompt=ids, max_tokens=0, echo=True, **ask)
    entries = scored.choices[0].logprobs
    assert entries is not None
    assert entries.token_logprobs is not None
    assert len(entries.token_logprobs) == len(ids)
    assert entries.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in entries.token_logprobs[1:])
    assert said.logprobs is not None
    first_said = (said.logprobs.top_logprobs or [])[0]
    more = real_client.completions.create(
        prompt=[*prompt, ids[len(prompt)]], max_tokens=0, echo=True, **ask
    )
    assert more.choices[0].logprobs is not None
    tops = (more.choices[0].logprobs.top_logprobs or [])[-1]
    best = max(first_said.values())
    assert max(tops.values()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_schema_is_kept(real_client: OpenAI, is_stream: bool) -> None:
    for seed in range(3):
        reply = real_client.chat.completions.create(
            model="sei",
            messages=HELLO,
            temperature=1,
            seed=seed,
            stream=is_stream,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": CITY},
            },
        )
        text = text_of(reply) if is_stream else reply.choices[0].message.content
        value = json.loads(text or "")
        assert value["city"] in ("Oslo", "Rome")
        assert value["days"] in (1, 2)


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_forced_call_is_a_call(real_client: OpenAI, tokenizer: Tokenizer, choice: Any) -> None:
    for seed in range(2):
        ask: Any = {
            "model": "sei",
            "messages": HELLO,
            "tools": TOOLS,
            "tool_choice": choice,
            "temperature": 1,
            "seed": seed,
            # A random model would reason first, and not know when to end.
            "logit_bias": {str(tokenizer.special_ids["<think>"]): -100},
        }
        got = real_client.chat.completions.create(**ask).choices[0]
        assert got.finish_reason == "tool_calls", got
        for call in got.message.tool_calls or []:
            value = json.loads(call.function.arguments)  # type: ignore[union-attr]
            assert set(value) <= {"city", "days"}
            if call.function.name == "weather":  # type: ignore[union-attr]
                assert value["city"] in ("Oslo", "Rome")


def test_forced_calls_without_parallel_ones_are_one(
    real_client: OpenAI, tokenizer: Tokenizer
) -> None:
    """A random model, that makes several where it may."""
    nums: dict[bool, set[int]] = {}
    for is_parallel in (True, False):
        for seed in range(4):
            ask: Any = {
                "model": "sei",
                "messages": HELLO,
                "tools": TOOLS,
                "tool_choice": "required",
                "parallel_tool_calls": is_parallel,
                "temperature": 1,
                "seed": seed,
                "max_tokens": 400,
                "logit_bias": {
                    str(tokenizer.special_ids["<think>"]): -100,
                    str(tokenizer.special_ids[TOOL_CALLS_END]): -4,
                },
            }
            got = real_client.chat.completions.create(**ask).choices[0]
            nums.setdefault(is_parallel, set()).add(len(got.message.tool_calls or []))
            if not is_parallel:
                assert got.finish_reason == "tool_calls"
                chunks = [
                    c.choices[0] for c in real_client.chat.completions.create(**ask, stream=True)
                ]
                parts = [p for c in chunks for p in c.delta.tool_calls or []]
                (call,) = got.message.tool_calls or []
                assert {part.index for part in parts} == {0}
                text = "".join(part.function.arguments or "" for part in parts)  # type: ignore[union-attr]
                assert text == call.function.arguments  # type: ignore[union-attr]
                assert chunks[-1].finish_reason == "tool_calls"
    assert nums[False] == {1}
    assert max(nums[True]) > 1, "nothing would have shown a fault"


def test_a_grammar_that_cannot_be_is_refused(real_client: OpenAI) -> None:
    wrong: Any = {"type": "regex", "regex": "("}
    with pytest.raises(openai.BadRequestError, match="regex") as caught:
        real_client.chat.completions.create(model="sei", messages=HELLO, response_format=wrong)
    assert caught.value.param == "response_format"


def test_blocks_come_back_when_clients_leave(real_live: Live, real: Engine) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 400, "logit_bias": {"1": -100}}
    for _ in range(4):
        with web.stream("POST", real_live.url + "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
    wait_until(lambda: real.stats().num_running + real.stats().num_waiting == 0)
    stats = real.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_metrics_of_the_real_engine(real_live: Live) -> None:
    text = web.get(real_live.url + "/metrics").text
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values["rorqual_output_tokens_total"] > 0
    assert values['rorqual_drafted_tokens_total{position="1"}'] > 0
    assert all(value >= 0 for value in values.values())
