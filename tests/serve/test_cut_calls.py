"""Calls that the answer's end cuts off, at whatever token. Oracle: no reply has a marker's name."""

from __future__ import annotations

from typing import Any

import pytest
import web
from live import Live
from served import SCRIPT

from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_no_route_shows_the_marks_of_a_call_that_is_cut(
    live: Live, tokenizer: Tokenizer, is_stream: bool
) -> None:
    """At whatever token; with `skip_special_tokens: false` the chat route shows all."""
    ask: dict[str, Any] = {
        "stream": is_stream,
        "messages": [{"role": "user", "content": "say and call"}],
    }
    tool = {"name": "weather", "parameters": {"type": "object"}}
    chat = {"tools": [{"type": "function", "function": tool}]}
    claude = {"tools": [{"name": "weather", "input_schema": {"type": "object"}}]}
    response = {"tools": [{"type": "function", **tool}], "input": "say and call"}
    length = len(tokenizer.encode(SCRIPT["say and call"], allow_special=True))
    is_shown = False
    for num in range(1, length):
        bodies = {
            "/v1/chat/completions": ask | chat | {"max_tokens": num},
            "/v1/messages": ask | claude | {"max_tokens": num},
            "/v1/responses": {"stream": is_stream, **response, "max_output_tokens": num},
        }
        for path, body in bodies.items():
            reply = web.post(live.url + path, json=body)
            assert reply.status_code == 200, reply.text
            assert "tool\u2581call" not in reply.text
        body = bodies["/v1/chat/completions"] | {"skip_special_tokens": False}
        is_shown |= "tool\u2581call" in web.post(live.url + "/v1/chat/completions", json=body).text
    assert is_shown
