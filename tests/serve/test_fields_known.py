"""What the chat route does is done on the other answer routes, or refused by name: never passed
over in silence. Oracle: the chat route's own rows of the table.
"""

from __future__ import annotations

from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live

from rorqual.serve.field_row import CHAT, CLAUDE, RESPONSES
from rorqual.serve.fields import BY_PLACE
from rorqual.serve.schemas_messages import MessagesRequest
from rorqual.serve.schemas_responses import ResponseRequest

pytestmark = pytest.mark.concurrency

BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hello", "max_output_tokens": 9},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9},
}


def test_every_field_of_the_chat_route_is_known_on_the_others() -> None:
    names = {
        row.name
        for row in BY_PLACE[CHAT].values()
        if row.fate == "honoured" and not {".", "["} & set(row.name)
    }
    assert len(names) > 40
    for place, schema in ((RESPONSES, ResponseRequest), (CLAUDE, MessagesRequest)):
        assert names <= {*schema.model_fields, *BY_PLACE[place]}, place


@pytest.mark.parametrize("path", BODIES)
def test_a_seed_and_min_p_reach_the_engine(live: Live, engine: FakeEngine, path: str) -> None:
    reply = web.post(live.url + path, json=BODIES[path] | {"seed": 5, "min_p": 0.25})
    assert reply.status_code == 200, reply.text
    params = engine.requests[-1].params
    assert (params.seed, params.min_p) == (5, 0.25)
    assert "x-rorqual-ignored-fields" not in reply.headers


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/v1/responses", {"guided_json": {"type": "object"}}, "use text.format"),
        ("/v1/responses", {"n_predict": 3}, "use max_output_tokens"),
        ("/v1/messages", {"guided_regex": "a"}, "use output_config.format"),
        ("/v1/messages", {"response_format": {"type": "json_object"}}, "use output_config.format"),
        ("/v1/messages", {"n": 2}, "one answer"),
        ("/v1/messages", {"stop": ["x"]}, "use stop_sequences"),
        ("/v1/messages", {"n_predict": 3}, "use max_tokens"),
        ("/v1/messages", {"min_p": 2}, "min_p"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    live: Live, path: str, fields: dict[str, Any], words: str
) -> None:
    reply = web.post(live.url + path, json=BODIES[path] | fields)
    assert reply.status_code == (400 if path == "/v1/messages" else 422)
    message = reply.json()["error"]["message"]
    assert words in message
    assert next(iter(fields)) in message
