"""What the page asks of its own server: which turns fit, what the model is, which fields there are.

Oracles: the terminal's conversation (`engine.Conversation`), the checks of the chat route.
"""

from __future__ import annotations

from typing import Any

import pytest
import web
from live import Live
from real import make_engine
from served import CONTEXT

from rorqual.engine import Conversation, SamplingParams
from rorqual.serve.chat_job import ChatText
from rorqual.serve.model_facts import model_facts
from rorqual.serve.page_api import SAMPLING, fitted
from rorqual.serve.settings import ServedModel
from rorqual.tokenizer import Tokenizer


def turns(number: int, text: str = "the whale swims in the sea") -> list[dict[str, Any]]:
    """So many questions, with answers between them."""
    roles = ["user", "assistant"] * number
    return [{"role": role, "content": f"{text} {n}"} for n, role in enumerate(roles[:-1])]


@pytest.mark.parametrize("number", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("system", [None, "sing"])
@pytest.mark.parametrize("max_tokens", [10, 4096])
def test_turns_are_dropped_as_in_the_terminal(
    tokenizer: Tokenizer, number: int, system: str | None, max_tokens: int
) -> None:
    engine = make_engine(tokenizer, max_model_len=200)
    params = SamplingParams(max_tokens=max_tokens)
    conversation = Conversation(engine, params, system)
    messages = turns(number)
    asked = [m["content"] for m in messages if m["role"] == "user"]
    answered = [m["content"] for m in messages if m["role"] == "assistant"]
    conversation.turns = list(zip(asked[:-1], answered, strict=True))
    conversation.ask(asked[-1])
    model = ServedModel(name="w", tokenizer=tokenizer, max_positions=200, defaults=params)
    first = [] if system is None else [{"role": "system", "content": system}]
    fit = fitted(ChatText(first + messages, None, None), model)
    assert fit.skipped == 2 * conversation.num_dropped_turns
    kept = ChatText(first + messages[fit.skipped :], None, None)
    assert fit.prompt_tokens == len(kept.encode(tokenizer))


def test_the_last_turn_is_never_dropped(tokenizer: Tokenizer) -> None:
    model = ServedModel(name="w", tokenizer=tokenizer, max_positions=60)
    long = [*turns(3), {"role": "assistant", "content": "x"}, {"role": "user", "content": "y" * 99}]
    assert fitted(ChatText(long, None, None), model).skipped == 6
    # An answer that goes on stands with its question.
    cut = [*turns(8), {"role": "assistant", "content": "so far", "prefix": True}]
    assert fitted(ChatText(cut, None, None), model).skipped == 14
    assert (
        fitted(ChatText([{"role": "system", "content": "z" * 99}], None, None), model).skipped == 0
    )


def test_the_routes(live: Live) -> None:
    address = f"{live.url}/page/api"
    fit = web.post(f"{address}/fit", json={"messages": turns(3)}).json()
    assert fit["skipped"] == 0
    assert fit["context"] == CONTEXT
    count = web.post(f"{live.url}/tokenize", json={"messages": turns(3)}).json()["count"]
    assert fit["prompt_tokens"] == count
    long = web.post(f"{address}/fit", json={"messages": turns(300)}).json()
    assert 0 < long["skipped"] < 599
    assert long["prompt_tokens"] <= CONTEXT // 2
    middle = {"messages": turns(60)}  # more than half of the context
    count = web.post(f"{live.url}/tokenize", json=middle).json()["count"]
    assert CONTEXT // 2 < count <= CONTEXT - 10
    assert web.post(f"{address}/fit", json=middle).json()["skipped"] > 0
    for name in ("max_tokens", "max_completion_tokens"):
        fit = web.post(f"{address}/fit", json=middle | {name: CONTEXT - count}).json()
        assert (fit["skipped"], fit["prompt_tokens"]) == (0, count)
        fit = web.post(f"{address}/fit", json=middle | {name: CONTEXT - count + 1}).json()
        assert fit["skipped"] == 2
    assert web.post(f"{address}/fit", json={"messages": []}).status_code == 422
    model = web.get(f"{address}/model").json()
    assert (model["id"], model["context"]) == ("sei", CONTEXT)
    assert ["Name", "sei, minke"] in model["facts"]


DEFAULTS = {
    "temperature": "0.25",
    "top_p": "off",
    "top_k": "off",
    "min_p": "off",
    "repetition_penalty": "1.0",
    "frequency_penalty": "0.0",
    "presence_penalty": "0.0",
    "max_tokens": str(CONTEXT),
    "min_tokens": "0",
    "thinking_token_budget": "off",
    "seed": "random",
    "stop": "none",
}


@pytest.mark.parametrize("name", SAMPLING)
def test_bounds_and_defaults_are_the_routes(live: Live, name: str) -> None:
    """What the page's field takes the chat route takes, and refuses what it refuses."""
    fields = web.get(f"{live.url}/page/api/model").json()["sampling"]
    field = next(each for each in fields if each["name"] == name)
    assert field["default"] == DEFAULTS[name]
    messages = [{"role": "user", "content": "hello"}]

    def status(value: object) -> int:
        body = {"messages": messages, name: value}
        return web.post(f"{live.url}/v1/chat/completions", json=body).status_code

    if field["kind"] == "text":
        assert status("x") == 200
        return
    low, high = field["min"], field["max"]
    assert status(low if not field["is_open"] else low + 0.5) == 200
    assert name == "thinking_token_budget" or status(low - 1) == 422  # -1 is vLLM's word for off
    assert not field["is_open"] or status(low) == 422
    if high is not None:
        assert status(high) == 200
        assert status(high + 1) == 422


def test_facts_are_the_engines(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer, max_model_len=200)
    facts = model_facts(engine, "Hello!", ("one",), is_bundled=True)
    table = dict(facts.table)
    assert table["Context"] == "200 tokens"
    assert table["Experts"].endswith("of 4 routed, 1 shared")
    assert "float32" in table["Weights"]
    assert "torch" in table["Kernels"]
    assert facts.limits is not None
    assert "200 tokens" in facts.limits
    assert model_facts(engine).limits is None
