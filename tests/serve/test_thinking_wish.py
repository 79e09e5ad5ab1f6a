"""Who wants the model to think first. Oracle: the prompt's end under a template with a switch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from served import make_model

from rorqual.serve.app import create_app
from rorqual.serve.notes import IGNORED_HEADER
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN

pytestmark = pytest.mark.concurrency

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    "<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}"
)


@pytest.fixture(scope="module")
def switched(tokenizer: Tokenizer) -> Any:
    able = replace(tokenizer, chat_template=TEMPLATE)
    engine = FakeEngine(able)
    with running(create_app(engine, make_model(able))) as live:
        yield live, engine


WISHES: list[tuple[dict[str, Any], bool | None, str]] = [
    ({}, None, ""),
    ({"thinking": None}, None, ""),
    ({"thinking": True}, True, "thinking"),
    ({"thinking": False}, False, "thinking"),
    ({"thinking": {"type": "enabled"}}, True, "thinking"),
    ({"thinking": {"type": "disabled"}}, False, "thinking"),
    ({"thinking": {"type": "enabled", "budget_tokens": 99}}, True, "thinking"),
    ({"reasoning_effort": "none"}, False, "reasoning_effort"),
    ({"reasoning_effort": "minimal"}, False, "reasoning_effort"),
    ({"reasoning_effort": "low"}, True, "reasoning_effort"),
    ({"reasoning_effort": "high"}, True, "reasoning_effort"),
    ({"reasoning": {"enabled": True}}, True, "reasoning"),
    ({"reasoning": {"enabled": False}}, False, "reasoning"),
    ({"reasoning": {"enabled": False, "effort": "high"}}, False, "reasoning"),
    ({"reasoning": {"enabled": True, "effort": "none"}}, True, "reasoning"),
    ({"reasoning": {"effort": "none"}}, False, "reasoning"),
    ({"chat_template_kwargs": {}}, None, ""),
    ({"chat_template_kwargs": {"thinking": True}}, True, "chat_template_kwargs.thinking"),
    (
        {"chat_template_kwargs": {"enable_thinking": True}, "thinking": False},
        True,
        "chat_template_kwargs.enable_thinking",
    ),
    ({"thinking": True, "reasoning_effort": "none"}, True, "thinking"),
]


@pytest.mark.parametrize(("fields", "is_on", "place"), WISHES)
@pytest.mark.parametrize("is_stream", [False, True])
def test_the_switch_is_set(
    switched: tuple[Live, FakeEngine],
    live: Live,
    fields: dict[str, Any],
    is_on: bool | None,
    place: str,
    is_stream: bool,
) -> None:
    able, engine = switched
    body = {"messages": [{"role": "user", "content": "hello"}], "n": 2, "stream": is_stream}
    response = web.post(able.url + PATH, json=body | fields)
    assert response.status_code == 200, response.text
    begin = engine.tokenizer.special_ids[THINK_BEGIN]
    ends = [request.prompt_ids[-1] == begin for request in engine.requests[-2:]]
    assert ends == [bool(is_on)] * 2
    named = response.headers.get(IGNORED_HEADER, "")
    assert named == ("thinking.budget_tokens" if "budget" in str(fields) else "")
    # Without a switch it is accepted and named.
    response = web.post(live.url + PATH, json=body | fields)
    assert response.status_code == 200
    names = response.headers.get(IGNORED_HEADER, "").split(", ")
    assert place in names


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": "yes"}, "thinking"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"reasoning_effort": "great"}, "reasoning_effort"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking": "no"}}, "chat_template_kwargs.thinking"),
        ({"chat_template_kwargs": {"enable_thinking": 0}}, "chat_template_kwargs.enable_thinking"),
    ],
)
def test_what_is_no_wish(live: Live, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]} | fields
    response = web.post(live.url + PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


def test_other_settings_of_a_template_are_named(live: Live) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    body["chat_template_kwargs"] = {"add_vision_id": True}
    response = web.post(live.url + PATH, json=body)
    assert response.headers[IGNORED_HEADER] == "chat_template_kwargs.add_vision_id"
