"""What honoured fields become. Oracle: the request that reaches the engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import web
from fake_engine import DEFAULT, FakeEngine
from live import Live

from rorqual.serve.notes import NOTES_HEADER
from rorqual.serve.prompts import NAMES_NOTE
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def post(live: Live, path: str, **fields: Any) -> httpx.Response:
    default: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    return web.post(live.url + path, json=default | fields)


def prompt_of(live: Live, engine: FakeEngine, path: str, **fields: Any) -> list[int]:
    response = post(live, path, **fields)
    assert response.status_code == 200, response.text
    return list(engine.requests[-1].prompt_ids)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"stop_token_ids": [5, 6]}, "stop_token_ids", (5, 6)),
        ({"stop_token_ids": []}, "stop_token_ids", ()),
        ({"allowed_token_ids": [5, 6]}, "allowed_token_ids", (5, 6)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"ignore_eos": False}, "ignore_eos", False),
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"min_tokens": 0}, "min_tokens", 0),
        ({"min_tokens": 8, "max_tokens": 8}, "min_tokens", 8),
        ({}, "skip_special_tokens", True),
        ({"skip_special_tokens": True}, "skip_special_tokens", True),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
        ({"top_k": 0}, "top_k", None),
        ({"top_k": -1}, "top_k", None),
        ({"top_k": 9}, "top_k", 9),
        ({"max_tokens": -1}, "max_tokens", 4096),
        ({"max_tokens": None}, "max_tokens", 4096),
    ],
)
def test_what_reaches_the_engine(
    live: Live, engine: FakeEngine, path: str, fields: dict[str, Any], name: str, value: Any
) -> None:
    for more in ({}, {"n": 2}, {"stream": True}):
        assert post(live, path, **fields, **more).status_code == 200
        for request in engine.requests[-more.get("n", 1) :]:
            assert getattr(request.params, name) == value


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999_999]}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [999_999]}, "allowed_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"n": 129}, "n"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    live: Live, path: str, fields: dict[str, Any], param: str
) -> None:
    response = post(live, path, **fields)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param


def test_an_end_that_is_ignored_does_not_go_with_a_grammar(live: Live) -> None:
    response = post(live, CHAT, ignore_eos=True, response_format={"type": "json_object"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "ignore_eos")


def test_a_developer_is_the_system(live: Live, engine: FakeEngine) -> None:
    prompts = []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, *HELLO]
        prompts.append(prompt_of(live, engine, CHAT, messages=messages))
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": "No."}]},
        {"content": [{"type": "output_text", "text": "No.", "annotations": []}]},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": [{"type": "input_text", "text": "N"}, {"type": "text", "text": "o."}]},
        {"content": None, "refusal": "No."},
        {"content": "No.", "refusal": None, "annotations": None, "audio": None, "id": "msg_1"},
        {"content": "No.", "function_call": None, "tool_calls": None, "name": None},
        {"content": "No.", "tool_calls": [], "provider_specific_fields": {"a": 1}},
        {"content": "No.", "cache_control": {"type": "ephemeral"}, "reasoning": "hm"},
    ],
)
def test_an_assistant_message_in_all_its_shapes(
    live: Live, engine: FakeEngine, message: dict[str, Any]
) -> None:
    plain, shaped = (
        prompt_of(live, engine, CHAT, messages=[*HELLO, {"role": "assistant"} | each, *HELLO])
        for each in ({"content": "No."}, message)
    )
    assert shaped == plain


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "thinking"])
def test_other_parts_are_refused_by_name(live: Live, kind: str) -> None:
    part = {"type": kind, kind: {"url": "data:"}}
    response = post(live, CHAT, messages=[{"role": "user", "content": [part]}])
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "messages[0].content[0]"
    assert kind in response.json()["error"]["message"]


def test_a_prompt_with_names_of_special_tokens(
    live: Live, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    text = "<|User|>hello<｜Assistant｜>"
    read = [tokenizer.bos_id, tokenizer.user_id, *tokenizer.encode("hello"), tokenizer.assistant_id]
    assert prompt_of(live, engine, TEXT, prompt=text, parse_special=True) == read
    assert prompt_of(live, engine, TEXT, prompt=[text, text], parse_special=True) == read
    named = post(live, TEXT, prompt=text)
    assert named.headers[NOTES_HEADER] == NAMES_NOTE
    assert tokenizer.user_id not in engine.requests[-1].prompt_ids
    assert NOTES_HEADER not in post(live, TEXT, prompt=text, parse_special=True).headers
    assert NOTES_HEADER not in post(live, TEXT, prompt="<User>").headers
    whole = "<|begin_of_sentence|>" + text
    assert prompt_of(live, engine, TEXT, prompt=whole, parse_special=True) == read
    ids = {"prompt": text, "parse_special": True}
    assert web.post(live.url + "/tokenize", json=ids).json()["tokens"] == read


def test_the_begin_of_sentence_may_be_left_out(
    live: Live, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    prompt = prompt_of(live, engine, TEXT, add_special_tokens=False)
    assert prompt == tokenizer.encode("hello")
    reply = post(live, TEXT, add_special_tokens=False, echo=True, logprobs=0).json()["choices"][0]
    assert reply["text"] == "hello" + DEFAULT
    assert reply["logprobs"]["token_logprobs"][0] is None  # nothing comes before it


def test_an_echo_of_names_shows_what_was_read(live: Live) -> None:
    fields = {"prompt": "<|User|>hello", "parse_special": True, "echo": True, "logprobs": 0}
    reply = post(live, TEXT, **fields).json()["choices"][0]
    assert reply["text"] == "<｜User｜>hello" + DEFAULT
    assert reply["logprobs"]["tokens"][0] == "<｜User｜>"
    offsets = reply["logprobs"]["text_offset"]
    assert reply["text"][offsets[1] :].startswith("hello")
