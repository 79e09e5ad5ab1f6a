"""What users can combine and no other test crosses. Oracle: the same request by the plain way."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, client_of, running
from openai import BadRequestError, NotFoundError
from real import make_engine, serve_engine
from served import SCRIPT, make_model

from patience import wait_until
from rorqual.bundled import BUNDLED, checkpoint_path
from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.draft_policy import FixedDrafts
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert

pytest.importorskip("llguidance")
validators = pytest.importorskip("jsonschema_rs")
pytestmark = pytest.mark.concurrency

CHAT = "/v1/chat/completions"
SWITCH = "{%- if add_generation_prompt -%}{{ '<think>' if thinking else '</think>' }}{%- endif -%}"
SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"],
          "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "Is the sea warm?"}]
WAYS = pytest.mark.parametrize(
    ("shipped", "is_stream"),
    [
        ("tiny", False),
        ("gguf:Q8_0", True),
        pytest.param("tiny", True, marks=pytest.mark.slow),
        pytest.param("gguf:Q8_0", False, marks=pytest.mark.slow),
        pytest.param("gguf:Q4_K_M", False, marks=pytest.mark.slow),
        pytest.param("gguf:Q4_K_M", True, marks=pytest.mark.slow),
    ],
    indirect=["shipped"],
)
SWITCHES = [{"thinking": True}, {"reasoning_effort": "none"},
            pytest.param({}, marks=pytest.mark.slow)]  # fmt: skip
CALL_TOKENS = 100
"""The shortest call takes 57 tokens of the small vocabulary."""


@pytest.fixture(scope="module")
def invariant(tokenizer: Tokenizer) -> Iterator[Live]:
    """The real engine, a random model, a template with a switch: company changes no bit."""
    able = replace(tokenizer, chat_template=tokenizer.chat_template + SWITCH)
    engine = make_engine(able, is_batch_invariant=True)
    with running(create_app(*serve_engine(engine))) as live:
        yield live


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_batch_lines_with_the_thinking_switch_and_constrained(
    invariant: Live, switch: dict[str, Any]
) -> None:
    """Each line is answered as the chat route answers its body."""
    schema = {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}
    forms: list[dict[str, Any]] = [
        {"max_tokens": 12},
        {"response_format": schema, "n": 2, "max_tokens": 40},
        {"response_format": {"type": "choice", "choices": ["yes", "no"]}, "max_tokens": 40},
        {"tools": [TOOL], "tool_choice": "required", "max_tokens": CALL_TOKENS},
    ]
    bodies = [{"messages": USER, "seed": 3, "temperature": 1, **switch, **form} for form in forms]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
        for number, body in enumerate(bodies)
    ]
    client = client_of(invariant)
    content = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    file_id = client.files.create(file=("in.jsonl", content), purpose="batch").id
    batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    output = client.batches.retrieve(batch.id).output_file_id
    assert output is not None
    records = list(map(json.loads, client.files.content(output).text.splitlines()))
    for body, record in zip(bodies, records, strict=True):
        plain = web.post(invariant.url + CHAT, json=body).json()
        assert without_ids(record["response"]["body"]) == without_ids(plain)
    choices = [record["response"]["body"]["choices"] for record in records]
    is_thinking = "thinking" in switch
    assert all(bool(c["message"].get("reasoning_content")) == is_thinking for c in choices[0])
    assert validators.is_valid(SCHEMA, json.loads(choices[1][0]["message"]["content"]))
    assert choices[2][0]["message"]["content"] in ("yes", "no")
    [call] = choices[3][0]["message"]["tool_calls"][:1]
    assert validators.is_valid(SCHEMA, json.loads(call["function"]["arguments"]))


def without_ids(reply: dict[str, Any]) -> list[Any]:
    for choice in reply["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            call.pop("id", None)
    return list(reply["choices"])


@pytest.fixture(scope="module")
def shipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """The bundled model, and quantised files that are made of it."""
    source = "tiny"
    if request.param != "tiny":
        source = str(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
        convert(checkpoint_path(BUNDLED), Path(source), Options(Target.parse(request.param)))
    with running(create_app(*serve_engine(Engine(source, max_batch=4)))) as live:
        yield live


@WAYS
def test_the_bundled_model_makes_a_forced_call(shipped: Live, is_stream: bool) -> None:
    """In every format and on every route that has tools."""
    said = {}
    call: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "messages": USER}
    reply = ask(shipped, CHAT, call | {"parallel_tool_calls": False, "max_tokens": 80}, is_stream)
    if is_stream:
        deltas = [choice["delta"] for chunk in reply for choice in chunk["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        said["chat"] = "".join(call["function"].get("arguments", "") for call in calls)
    else:
        [made] = reply[0]["choices"][0]["message"]["tool_calls"]
        assert reply[0]["choices"][0]["finish_reason"] == "tool_calls"
        said["chat"] = made["function"]["arguments"]
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    body = {"input": USER[0]["content"], "tools": [tool], "tool_choice": "required"}
    reply = ask(shipped, "/v1/responses", body | {"max_output_tokens": 80}, is_stream)
    response = reply[-1]["response"] if is_stream else reply[0]
    assert response["status"] == "completed"
    said["responses"] = response["output"][0]["arguments"]
    body = {"messages": USER, "max_tokens": 80, "tool_choice": {"type": "tool", "name": "weather"}}
    body |= {"tools": [{"name": "weather", "input_schema": SCHEMA}]}
    reply = ask(shipped, "/v1/messages", body, is_stream)
    if is_stream:
        deltas = [event["delta"] for event in reply if event["type"] == "content_block_delta"]
        said["messages"] = "".join(delta["partial_json"] for delta in deltas)
    else:
        said["messages"] = json.dumps(reply[0]["content"][0]["input"])
    assert len({str(json.loads(text)) for text in said.values()}) == 1
    assert validators.is_valid(SCHEMA, json.loads(said["chat"]))


@WAYS
def test_every_route_says_what_the_chat_route_says(shipped: Live, is_stream: bool) -> None:
    chat = {"messages": USER, "max_tokens": 16}
    [reply] = ask(shipped, CHAT, chat, False)
    said = reply["choices"][0]["message"]["content"]
    assert said
    body: dict[str, Any] = {"input": USER[0]["content"], "max_output_tokens": 16}
    found = ask(shipped, "/v1/responses", body, is_stream)
    response = found[-1]["response"] if is_stream else found[0]
    assert response["output"][0]["content"][0]["text"] == said
    found = ask(shipped, "/v1/messages", chat, is_stream)
    if is_stream:
        deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
        assert "".join(delta["text"] for delta in deltas) == said
    else:
        assert found[0]["content"][0]["text"] == said


def ask(live: Live, route: str, body: dict[str, Any], is_stream: bool) -> list[Any]:
    """The reply, or the data of its events; greedy."""
    reply = web.post(live.url + route, json={"temperature": 0, "stream": is_stream} | body)
    assert reply.status_code == 200, reply.text
    if not is_stream:
        return [reply.json()]
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


def test_two_servers_on_one_folder_share_responses(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What one has stored, the other continues, shows and deletes; each key sees its own."""
    keys = ("first-key-0001", "second-key-0002")
    settings = ServerSettings(state_dir=tmp_path / "state", api_keys=keys)
    engines = [FakeEngine(tokenizer, SCRIPT) for _ in range(2)]
    apps = [create_app(engine, make_model(tokenizer), settings) for engine in engines]
    with running(apps[0]) as one, running(apps[1]) as two:
        here, there = client_of(one, keys[0]), client_of(two, keys[0])
        first = here.responses.create(model="sei", input="call two", tools=[named("weather")])
        shown = there.responses.retrieve(first.id)
        assert shown.to_dict() == first.to_dict()
        output: Any = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "warm"}
            for item in first.output
            if item.type == "function_call"
        ]
        assert output
        whole = {"model": "sei", "tools": [named("weather")]}
        second = there.responses.create(input=output, previous_response_id=first.id, **whole)
        again = here.responses.create(input=output, previous_response_id=first.id, **whole)
        assert engines[1].requests[-1].prompt_ids == engines[0].requests[-1].prompt_ids
        assert second.output_text == again.output_text
        stranger = client_of(two, keys[1])
        with pytest.raises(NotFoundError):
            stranger.responses.retrieve(first.id)
        with pytest.raises(BadRequestError):
            stranger.responses.create(model="sei", input="x", previous_response_id=first.id)
        there.responses.delete(first.id)
        with pytest.raises(NotFoundError):
            here.responses.retrieve(first.id)
        assert here.responses.retrieve(second.id).id == second.id


def named(name: str) -> Any:
    return {"type": "function", "name": name, "parameters": None, "strict": None}


@pytest.mark.parametrize("num_drafts", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_end_of_reasoning_is_the_same_in_company(tokenizer: Tokenizer, num_drafts: int) -> None:
    """`max_thinking_tokens` with `--batch-invariant`: the same bits alone and among others."""
    engine = make_engine(
        tokenizer,
        is_batch_invariant=True,
        speculate=num_drafts,
        draft_policy=FixedDrafts(num_drafts),
        max_step_tokens=40,
    )
    end_id = tokenizer.special_ids[THINK_END]
    never = {end_id: -100.0, tokenizer.eos_id: -100.0}
    requests = [
        Request(
            tokenizer.encode(f"Whale {number}. {THINK_BEGIN}", bos=True, allow_special=True),
            SamplingParams(
                temperature=1,
                seed=number,
                max_tokens=14,
                max_thinking_tokens=limit,
                logit_bias=never,
                logprobs=3,
            ),
        )
        for number, limit in enumerate([0, 3, 5, 8, None, 3])
    ]
    alone = [next(iter(engine.generate_each([request]))) for request in requests]
    together = list(engine.generate_each(requests))
    assert together == alone  # texts, ids and log-probabilities, bit for bit
    for request, output in zip(requests, together, strict=True):
        limit = request.params.max_thinking_tokens
        assert (end_id in output.token_ids) == (limit is not None)
        if limit is not None:
            assert output.token_ids.index(end_id) <= limit
