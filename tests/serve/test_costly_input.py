"""What a stranger sends takes time in proportion to its length, however it is written.

Each of these took time that grows with the square of the length: seconds to hours at the lengths
that the server takes, in which nobody else was answered. Oracle: the time of as many harmless
bytes, and the text that is to come out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import h11
import pytest
from pydantic import BaseModel, ValidationError

from rorqual.serve.chat_builder import ChatBuilder
from rorqual.serve.errors import ApiError
from rorqual.serve.framing import EMPTY_LINES, HEAD_BYTES, Framing
from rorqual.serve.json_values import check_values, num_marks
from rorqual.serve.notes import IGNORED_HEADER, MAX_TOLD
from rorqual.serve.parse_stream import StreamParser, ToolCallArguments
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_common import Body
from rorqual.serve.schemas_completions import CompletionRequest, DetokenizeRequest
from rorqual.serve.schemas_messages import MessagesRequest
from rorqual.serve.schemas_responses import ResponseRequest
from rorqual.serve.tool_shapes import safe_names
from rorqual.tokenizer.kept import check_kept
from rorqual.tokenizer.marks import CALL, CALL_OVER, CALLS, SEP

MIB = 2**20
FEW_SECONDS = 5.0
"""Of processor time: each takes a tenth of one at most, and took a minute and more."""
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.parametrize("beginning", [b"", b"[,,,,", b'{"a": "b", "c\\n": '])
@pytest.mark.parametrize("end", [b"", b"\\", b'"', b',,,"'])
def test_a_text_without_an_end_is_read_once(beginning: bytes, end: bytes) -> None:
    content = beginning + b'"' + b'\\"' * MIB + b"," * 100 + end

    def check() -> None:
        check_values(content, num_marks(beginning) + 3)

    assert seconds(check) < FEW_SECONDS


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_lines_that_are_empty_cost_no_more_than_others(size: int) -> None:
    framing = Framing()
    data = b"\r\n" * (MIB // (4096 // size)) + GET + b"\r\n"

    def read() -> None:
        for start in range(0, len(data), size):
            framing.receive_data(data[start : start + size])
            while isinstance(framing.next_event(), h11.Request):
                framing.send(h11.InformationalResponse(status_code=100, headers=[]))

    assert seconds(read) < FEW_SECONDS
    assert framing.their_state is h11.DONE


def test_a_length_with_spaces_in_it_is_refused_at_once() -> None:
    room = HEAD_BYTES - len(GET) - 100
    heads = [GET + b"Content-Length: 1" + b" " * room + b"1\r\n\r\n"] * 20

    def read(head: bytes) -> None:
        framing = Framing()
        framing.receive_data(head)
        with pytest.raises(h11.RemoteProtocolError, match="no number"):
            framing.next_event()

    assert seconds(lambda: [read(head) for head in heads]) < FEW_SECONDS


def test_many_names_that_are_written_alike() -> None:
    names = [chr(0x4E00 + number) for number in range(20_000)] + ["tool_3"]
    found: dict[str, str] = {}
    assert seconds(lambda: found.update(safe_names(names))) < FEW_SECONDS
    assert len(set(found.values())) == len(names)
    assert [found[name] for name in (*names[:3], names[-1])] == [
        "tool", "tool_2", "tool_4", "tool_3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("add", "field", "between"),
    [("add_user_text", "content", "\n\n"), ("add_said", "content", ""),
     ("add_thought", "reasoning_content", "")],
)  # fmt: skip
def test_a_turn_of_many_parts(add: str, field: str, between: str) -> None:
    builder = ChatBuilder()
    parts = [f"{number:400}" for number in range(50_000)]
    texts: list[Any] = []

    def build() -> None:
        for part in parts:
            getattr(builder, add)(part, "input[0]")
        builder.add("user", "?", "input[1]")
        texts.append(getattr(builder.request({}).messages[0], field))

    assert seconds(build) < FEW_SECONDS
    assert texts == [between.join(parts)]


def test_many_calls_are_found_in_a_long_prompt() -> None:
    names = [f"f{number}" for number in range(20_000)]
    calls = [{"function": {"name": name, "arguments": "{" + "x" * 90 + "}"}} for name in names]
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in calls]
    prompt = "".join(call["function"]["name"] + call["function"]["arguments"] for call in calls)
    assert seconds(lambda: check_kept(prompt, messages, [])) < FEW_SECONDS


@pytest.mark.parametrize("ending", ["", "x", "\n```"])
def test_a_call_with_a_long_run_of_spaces(ending: str) -> None:
    """A custom tool's regular expression may ask for it."""
    parser = StreamParser(has_tools=True)
    run = " " * 100_000 + ending
    parts: list[str] = []

    def parse() -> None:
        for text in (f"{CALLS}{CALL}function{SEP}f\n```json\n{{", run, "}\n```", CALL_OVER):
            events = parser.put(text)
            parts.extend(e.text for e in events if isinstance(e, ToolCallArguments))

    assert seconds(parse) < FEW_SECONDS
    assert "".join(parts) == "{" + run + "}"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-16"])
def test_values_do_not_hide_in_another_encoding(encoding: str) -> None:
    """In UTF-16 the half of another letter looks like a quote; RFC 8259 §8.1 asks for UTF-8."""
    content = ('["\u0122"' + ",1" * 9000 + "]").encode(encoding)
    with pytest.raises(ApiError, match="UTF-8") as caught:
        check_values(content, 100)
    assert caught.value.status == 400


def test_empty_lines_are_told_from_a_request() -> None:
    found = EMPTY_LINES.match(b"\r\n\r\n\rGET")
    assert found is not None
    assert found.end() == 4


HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
MANY = 40_000


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (DetokenizeRequest, {"tokens": ["x"] * MANY}),
        (CompletionRequest, {"prompt": [1, *["x"] * MANY]}),
        (CompletionRequest, {"prompt": [[1], ["x"] * MANY]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, HELLO | {"logit_bias": {str(n): "x" for n in range(MANY)}}),
        (MessagesRequest, HELLO | {"max_tokens": 1, "tools": [3] * MANY}),
        (MessagesRequest, HELLO | {"max_tokens": 1, "stop_sequences": [3] * MANY}),
        (MessagesRequest, HELLO | {"max_tokens": 1, "system": [3] * MANY}),
        (ResponseRequest, {"input": "hi", "tools": [3] * MANY}),
        (ResponseRequest, {"input": "hi", "include": [3] * MANY}),
        (ResponseRequest, {"input": [{"role": "user", "content": [{}] * MANY}]}),
    ],
)
def test_a_list_is_not_read_beyond_its_first_fault(
    schema: type[Body], fields: dict[str, Any]
) -> None:
    """Each fault took ten times as long as a value. (A part that is none has two.)"""
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(fields)
    assert caught.value.error_count() <= 2


def test_many_fields_that_nobody_knows_are_counted_and_a_thousand_told_apart() -> None:
    """In time that grows with their number: pydantic looked for `_notes` among them, each time."""
    names = [f"field_{number}" for number in range(MANY)]
    body = ChatRequest.model_validate(HELLO | dict.fromkeys(names))
    assert [extra.name for extra in body.notes.unknown] == names
    assert body.notes.ignored == names[:20]
    assert body.notes.headers()[IGNORED_HEADER].endswith("field_19, ...")
    assert len(body.notes._ignored) == MAX_TOLD


def test_notes_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    look = BaseModel.__getattr__  # type: ignore[attr-defined]

    def note(self: BaseModel, name: str) -> Any:
        seen.append(name)
        return look(self, name)

    monkeypatch.setattr(BaseModel, "__getattr__", note)
    ChatRequest.model_validate(HELLO | {f"field_{number}": 1 for number in range(100)})
    assert seen.count("_notes") < 10
