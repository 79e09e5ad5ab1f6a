"""`rorqual generate --input-file` reads and answers what the server does.

Oracle: the server over the same checkpoint, which gets each line's body: its reply, its notes in
headers, its errors.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import web
from live import Live, running
from real import CONFIG, serve_engine
from served import make_model

from in_process import Done, run
from rorqual.cli.request_lines import COUNTS, Reader, _offset
from rorqual.engine import MAX_SEED, Engine, SamplingParams, grammar_trial
from rorqual.model import build
from rorqual.serve.app import create_app
from rorqual.serve.notes import IGNORED_HEADER
from rorqual.tokenizer import Tokenizer
from rorqual.weights import save

pytest.importorskip("llguidance")
pytestmark = pytest.mark.concurrency

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SWITCH = "{%- if add_generation_prompt -%}{{ '<think>' if thinking else '</think>' }}{%- endif -%}"
SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"],
          "additionalProperties": False}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CUSTOM = {"type": "custom", "custom": {"name": "my shell!"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
USER = {"role": "user", "content": "Well?"}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "sea"}],
}
CALLS = [
    {"id": name, "type": "function", "function": {"name": "weather", "arguments": '{"hot": true}'}}
    for name in ("a", "b")
]
ROUND = [
    {"role": "developer", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "b", "content": "cold"},
    {"role": "tool", "tool_call_id": "a", "content": "hot"},
]
PREFIX = {"role": "assistant", "content": "It", "prefix": True, "reasoning_content": "Hm"}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER], "temperature": 0, "max_tokens": 9},
    "parts": {"messages": [PARTS], "seed": 1, "stop": ["e", "q"]},
    "tools": {"messages": ROUND, "tools": [TOOL], "seed": 2},
    "forced": {"messages": [USER], "tools": [TOOL], "tool_choice": NAMED, "seed": 3},
    "custom": {"messages": [USER], "tools": [CUSTOM], "tool_choice": "required", "seed": 3},
    "prefix": {"messages": [USER, PREFIX], "seed": 4, "thinking": True},
    "thinking": {"messages": [USER], "thinking": {"type": "enabled"}, "seed": 5},
    "thought": {"messages": [USER], "thinking": True, "tools": [TOOL], "tool_choice": "required"},
    "n": {"messages": [USER], "n": 3, "seed": 6, "temperature": 1, "logit_bias": {"40": 5.0}},
    "json": {
        "messages": [USER],
        "n": 2,
        "seed": 9,
        "response_format": FORM,
    },
    "regex": {"messages": [USER], "response_format": {"type": "regex", "regex": "[0-9]{5}"}},
    "logprobs": {"messages": [USER], "logprobs": True, "top_logprobs": 2, "temperature": 0},
    "guided": {"messages": [USER], "guided_choice": ["sea", "whale"], "n_cmpl": 2, "seed": 1},
}
TEXTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "The whale", "temperature": 0, "max_tokens": 9},
    "texts": {"prompt": ["The whale", "Two"], "n": 2, "seed": 1},
    "ids": {"prompt": [40, 41, 42], "seed": 2, "top_k": 5},
    "fim": {"prompt": "The ", "suffix": " sea", "seed": 3},
    "echo": {"prompt": "The whale", "echo": True, "logprobs": 2, "seed": 4},
    "scored": {"prompt": "The whale", "echo": True, "logprobs": 1, "max_tokens": 0},
    "json": {"prompt": ["The", "A"], "response_format": FORM, "max_tokens": 40, "seed": 6},
    "special": {"prompt": "<|User|>Well?", "parse_special": True, "seed": 5},
    "gbnf": {"prompt": ["The ", "A "], "grammar": 'root ::= "sea" | "whale"', "seed": 6},
}
ROUNDING = 1e-4  # float32
DEFAULTS: dict[str, Any] = {"max_tokens": 24, "temperature": 0.5}
CALL_TOKENS = 90
"""The shortest call takes 57 tokens of this small vocabulary."""


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    able = replace(tokenizer, chat_template=tokenizer.chat_template + SWITCH)
    folder = tmp_path_factory.mktemp("offline") / "sei"
    save(build(CONFIG, seed=5), folder, "float32", able)
    return folder


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with running(create_app(*serve_engine(Engine(folder, dtype="float32")))) as live:
        yield live


def generate(folder: Path, lines: list[Any], *flags: object) -> Done:
    source = folder.parent / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    defaults = ("--max-new-tokens", DEFAULTS["max_tokens"], "--temperature", 0.5)
    which = ("--model", folder, "--dtype", "float32")  # sums that company hardly changes
    command = ("generate", *which, "--input-file", source, "--json")
    return run(*command, *defaults, *flags)


def told(reply: dict[str, Any]) -> dict[str, Any]:
    """What of a reply does not change from one to the next."""
    for choice in reply["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            assert call.pop("id")
    usage = {name: reply["usage"][name] for name in COUNTS}
    return {"choices": reply["choices"], "usage": usage}


def are_same(one: Any, other: Any) -> bool:
    """Up to rounding: steps of other sizes sum log-probabilities in another order."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=ROUNDING)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(are_same, one, other))
    return bool(one == other)


def served(live: Live, route: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = web.post(live.url + route, json=DEFAULTS | body)
    assert reply.status_code == 200, reply.text
    return told(reply.json())


def settled(body: dict[str, Any]) -> dict[str, Any]:
    """Without chance: a body that names no seed is greedy. A forced call may come whole."""
    chance = {} if "seed" in body else {"temperature": 0}
    return body | chance | ({"max_tokens": CALL_TOKENS} if "tool_choice" in body else {})


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_line_is_answered_as_the_server_answers_it(folder: Path, live: Live, route: str) -> None:
    bodies, flags = (CHATS, ()) if route == CHAT else (TEXTS, ("--raw",))
    lines = [{"id": name} | settled(body) for name, body in bodies.items()]
    done = generate(folder, lines, *flags)
    assert done.code == 0, done.err
    answers = [json.loads(line) for line in done.out.splitlines()]
    for line, answer in zip(lines, answers, strict=True):
        assert {name: answer[name] for name in line} == line
        wanted = served(live, route, settled(bodies[line["id"]]))
        first = wanted["choices"][0]
        assert answer["finish_reason"] == first["finish_reason"], line["id"]
        assert answer["usage"] == wanted["usage"]
        message = first.get("message", {"content": first.get("text")})
        if len(wanted["choices"]) > 1 or "logprobs" in line:
            assert are_same(told(answer)["choices"], wanted["choices"])
        if {"tool_calls", "reasoning_content"} & set(message):
            for call in answer.get("tool_calls", ()):
                call.pop("id", None)
            shown = [name for name in message if name != "role"]
            assert [answer[name] for name in shown] == [message[name] for name in shown]
        else:
            assert answer["text"] == message["content"], line["id"]
    if route == CHAT:
        by_id = {answer["id"]: answer for answer in answers}
        names = ("forced", "custom", "thought")
        assert {by_id[name]["finish_reason"] for name in names} == {"tool_calls"}
        assert by_id["thinking"]["reasoning_content"]


def test_a_batch_line_gets_the_record_of_a_batch(folder: Path, live: Live) -> None:
    """Chats and completions in one file, whatever --raw says, with the switch and a schema."""
    bodies = [(CHAT, body) for body in CHATS.values()]
    bodies += [(COMPLETIONS, body) for body in TEXTS.values()]
    lines = [
        {
            "custom_id": f"n{n}",
            "method": "POST",
            "url": route,
            "body": settled(body) | {"model": "m"},
        }
        for n, (route, body) in enumerate(bodies)
    ]
    done = generate(folder, lines, "--raw")
    assert done.code == 0, done.err
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["custom_id"] for record in records] == [line["custom_id"] for line in lines]
    for record, (route, body) in zip(records, bodies, strict=True):
        assert set(record) == {"id", "custom_id", "response", "error"}
        assert record["error"] is None
        assert record["response"]["status_code"] == 200
        reply = record["response"]["body"]
        assert reply["object"] == {CHAT: "chat.completion", COMPLETIONS: "text_completion"}[route]
        assert are_same(told(reply), served(live, route, settled(body)))
    assert done.err.count("fields without effect: model") == 1


def test_a_seed_counts_on_from_line_to_line(folder: Path) -> None:
    """And over the choices of a line; a seed of the line's own is its own."""
    body = {"prompt": "Well?", "temperature": 1, "max_tokens": 12}
    lines = [body, body | {"n": 2}, body, body | {"seed": 8}, body | {"seed": 10}]
    answers = [json.loads(line) for line in generate(folder, lines, "--seed", 7).out.splitlines()]
    texts = [answer["text"] for answer in answers]
    choices = [choice["message"]["content"] for choice in answers[1]["choices"]]
    assert texts[3] == texts[1] == choices[0]
    assert texts[4] == texts[2]
    assert len({texts[0], *choices, texts[2]}) == 4


def test_the_seed_behind_the_last_is_the_first() -> None:
    for seed, offset, counted in (
        (MAX_SEED, 0, MAX_SEED),
        (MAX_SEED, 1, 0),
        (MAX_SEED - 1, 1, MAX_SEED),
    ):
        assert _offset(SamplingParams(seed=seed), offset).seed == counted
    assert _offset(SamplingParams(), 3).seed is None


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "x", "content": "a"}]}),
        (CHAT, {"messages": [USER], "temperature": "hot"}),
        (CHAT, {"messages": [USER], "tools": {"a": 1}}),
        (CHAT, {"messages": [USER], "tool_choice": "required"}),
        (CHAT, {"messages": [USER], "chat_template_kwargs": {"thinking": "yes"}}),
        (CHAT, {"messages": [USER, ROUND[3]]}),
        (CHAT, {"messages": [PREFIX, USER]}),
        (CHAT, {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]}),
        (CHAT, {"messages": [USER], "response_format": {"type": "regex", "regex": "("}}),
        (CHAT, {"messages": [USER | {"content": "x1" * 20000}]}),
        (COMPLETIONS, {"prompt": 3}),
        (COMPLETIONS, {"prompt": [999_999]}),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 200}}),
    ],
)
def test_an_error_is_the_servers_with_file_and_line(
    folder: Path, live: Live, route: str, body: dict[str, Any]
) -> None:
    reply = web.post(live.url + route, json=body)
    assert reply.status_code in (400, 422)
    message = reply.json()["error"]["message"]
    flags = ("--raw",) if route == COMPLETIONS else ()
    batch = {"custom_id": "a", "method": "POST", "url": route, "body": body}
    for line in (body, batch):
        done = generate(folder, [{"prompt": "good"}, line], *flags)
        assert (done.code, done.out) == (2, "")
        assert "in.jsonl, line 2: cannot be answered: " in done.err
        what = message.partition(" (found ")[0].partition(" (expected ")[0]
        assert what in done.err, message


def test_with_a_system_text_places_are_still_the_files(folder: Path) -> None:
    done = generate(folder, [{"messages": [PREFIX, USER]}], "--system", "Be brief.")
    assert done.code == 2
    assert "messages[0]" in done.err


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"url": "/v1/embeddings"}, "there is no such url"),
        ({"url": "/v1/responses", "body": {"input": "a"}}, "which only a server does"),
        ({"method": "GET"}, "method: Input should be"),
        ({"custom_id": None}, "missing field 'custom_id'"),
        ({"more": 1}, "unknown field 'more'"),
        ({"body": {"messages": [USER], "stream": True}}, "a batch cannot stream"),
        ({"body": 5}, "the body must be a JSON object"),
        ({"custom_id": "first"}, "custom_id 'first' is there twice"),
    ],
)
def test_a_bad_batch_line_is_named(folder: Path, changes: dict[str, Any], what: str) -> None:
    good = {"custom_id": "first", "method": "POST", "url": CHAT, "body": {"messages": [USER]}}
    done = generate(folder, [good, good | {"custom_id": "second"} | changes])
    assert (done.code, done.out) == (2, "")
    assert "line 2: cannot be answered: " in done.err
    assert what in done.err


def test_fields_without_effect_are_named_once(folder: Path, live: Live) -> None:
    body = {"messages": [USER], "max_tokens": 3, "temperture": 1}
    body["response_format"] = {
        "type": "json_schema",
        "json_schema": {"schema": SCHEMA | {"not": {"required": ["x"]}}},
    }
    ignored = web.post(live.url + CHAT, json=body).headers[IGNORED_HEADER]
    done = generate(folder, [body, body, body | {"stream": True, "magic": 2}])
    assert done.code == 0
    assert done.err.count("without effect") == 2
    assert f"line 1: fields without effect: {ignored}" in done.err
    assert "line 3: fields without effect: magic, stream" in done.err


def test_what_only_completions_have_needs_raw(folder: Path) -> None:
    for line in ({"prompt": "a", "suffix": "b"}, {"prompt": ["a", "b"]}):
        done = generate(folder, [line])
        assert done.code == 2
        assert "add --raw" in done.err
        assert generate(folder, [line | {"max_tokens": 2}], "--raw").code == 0
    off = {"suffix": None, "echo": False, "parse_special": None, "best_of": 1}
    done = generate(folder, [{"prompt": "a", "max_tokens": 2, "add_special_tokens": True} | off])
    assert (done.code, done.err) == (0, "")


def test_a_grammar_is_tried_as_the_server_tries_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the same time, and nothing is left of it."""
    monkeypatch.setattr(grammar_trial, "MAX_SECONDS", 0)
    endless = {"anyOf": [{"type": "integer", "multipleOf": 99991 - i} for i in range(60)]}
    form = {"type": "json_schema", "json_schema": {"schema": endless}}
    closed, close = [], grammar_trial.GrammarTrial.close

    def noted(trial: grammar_trial.GrammarTrial) -> None:
        closed.append(trial)
        close(trial)

    monkeypatch.setattr(grammar_trial.GrammarTrial, "close", noted)
    done = generate(folder, [{"messages": [USER], "response_format": form}])
    assert (done.code, done.out) == (2, "")
    assert "line 1: cannot be answered: the grammar takes too long to compile" in done.err
    assert len(closed) == 1


def test_no_line_goes_over_the_vocabulary_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A real one has 129,280 entries, a file any number of lines."""

    class Counted(tuple[bytes, ...]):
        num_passes = 0

        def __iter__(self) -> Iterator[bytes]:
            Counted.num_passes += 1
            return super().__iter__()

    counted = replace(tokenizer, token_bytes=Counted(tokenizer.token_bytes))
    reader = Reader(make_model(counted), is_chat=True)
    path = tmp_path / "in.txt"
    passes = []
    for num_lines in (2, 20):
        path.write_text("Well?\n" * num_lines)
        assert reader.check(path) == num_lines
        passes.append(Counted.num_passes)
    assert passes[0] == passes[1]


def test_reading_requests_needs_no_web_server() -> None:
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'h11', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "import rorqual.cli.request_lines, rorqual.serve.offline, rorqual.serve.batch_lines"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
