"""What the chat page asks its own server for, beside the API's routes: blocks of markdown as HTML,
which turns of a chat fit the context, and what the model is.

No state is kept. The page's files need no key, these do.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from rorqual.engine.conversation import prompt_room
from rorqual.serve.bodies import BodyRoute
from rorqual.serve.chat_job import ChatText, chat_text
from rorqual.serve.page_markdown import TooMuchError, page_html
from rorqual.serve.routes import caller_of, service_of
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_common import SamplingFields, Strict
from rorqual.serve.service import Service
from rorqual.serve.settings import ServedModel

MAX_TEXTS, MAX_CHARS = 256, 200_000
"""Of one request: texts, and their characters. What is beyond stays plain."""
MAX_SECONDS = 1.0
"""Of rendering for one request: texts that are left then stay plain."""
SAMPLING = {
    "temperature": ("Temperature", "0 always takes the likeliest token; higher is freer."),
    "top_p": ("Top-p", "Only the likeliest tokens that together reach this share."),
    "top_k": ("Top-k", "Only the k likeliest tokens; 0: off."),
    "min_p": ("Min-p", "Only tokens at least this share as likely as the first."),
    "repetition_penalty": ("Repetition penalty", "Above 1: what was said is less likely."),
    "frequency_penalty": ("Frequency penalty", "Above 0: each time a token is used it counts."),
    "presence_penalty": ("Presence penalty", "Above 0: what was used once is less likely."),
    "max_tokens": ("Longest answer", "In tokens."),
    "min_tokens": ("Shortest answer", "In tokens; it does not end before."),
    "thinking_token_budget": ("Longest thinking", "In tokens, where the model thinks first."),
    "seed": ("Seed", "The same seed gives the same answer."),
    "stop": ("Stop text", "The answer ends before it."),
}
"""What the page lets people set: a name, and what it does."""
UNSET = {"seed": "random", "stop": "none"}


class RenderRequest(Strict):
    texts: list[str] = Field(max_length=MAX_TEXTS)


@dataclass(frozen=True)
class Fit:
    """`skipped` messages behind the system text are left out of the prompt."""

    skipped: int
    prompt_tokens: int
    context: int


def page_api_router() -> APIRouter:
    router = APIRouter(
        prefix="/page/api", include_in_schema=False, route_class=BodyRoute, tags=["page"]
    )

    @router.post("/render")
    async def render(request: Request, body: RenderRequest) -> Response:
        """`htmls`, one a text; null for what is to stay plain."""
        num_chars = sum(map(len, body.texts))
        work = partial(rendered, body.texts)
        htmls = await service_of(request).aside(work, "texts", caller_of(request), num_chars)
        return JSONResponse({"htmls": htmls})

    @router.post("/fit")
    async def fit(request: Request, body: ChatRequest) -> Response:
        """How many of the oldest messages are to be left out, so that there is room to answer."""
        service = service_of(request)
        service.check_body(body)
        text = chat_text(body, service.model.tokenizer)
        max_tokens = body.max_completion_tokens or body.max_tokens
        work = partial(fitted, text, service.model, max_tokens)
        found = await service.aside(work, "messages", caller_of(request), text.num_chars)
        return JSONResponse(vars(found))

    @router.get("/model")
    async def model(request: Request) -> Response:
        return JSONResponse(described(service_of(request)))

    return router


def rendered(texts: Sequence[str]) -> list[str | None]:
    htmls: list[str | None] = []
    num_left, ends_at = MAX_CHARS, time.monotonic() + MAX_SECONDS
    for text in texts:
        num_left -= len(text)
        html = None
        if num_left >= 0 and time.monotonic() < ends_at:
            with suppress(TooMuchError):
                html = page_html(text, ends_at)
        htmls.append(html)
    return htmls


def fitted(text: ChatText, model: ServedModel, max_tokens: int | None = None) -> Fit:
    """The oldest turns are dropped, as in the terminal, never the system text and the last one.
    A prompt that leaves no room even so is the chat route's to refuse.
    """
    room = prompt_room(model.max_positions, max_tokens or model.defaults.max_tokens)
    roles = [message["role"] for message in text.messages]
    begin = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    turns = [index for index, role in enumerate(roles) if role == "user"] or [begin]

    def num_tokens(turn: int) -> int:
        messages = text.messages[:begin] + text.messages[turns[turn] :]
        return len(replace(text, messages=messages).encode(model.tokenizer))

    whole = len(text.encode(model.tokenizer))
    if whole <= room:
        return Fit(0, whole, model.max_positions)
    first = bisect_left(range(len(turns) - 1), -room, key=lambda turn: -num_tokens(turn))
    return Fit(turns[first] - begin, num_tokens(first), model.max_positions)


def described(service: Service) -> dict[str, Any]:
    """The model as the page shows it, and the sampling fields with their bounds and defaults."""
    model, facts = service.model, service.model.facts
    speed = service.metrics.tokens_a_second
    table = [["Name", ", ".join(model.names)], *map(list, facts.table)]
    table.append(["Speed", f"{speed:.1f} tokens/s of one answer" if speed else "not measured yet"])
    return {
        "id": model.name,
        "context": model.max_positions,
        "has_thinking_switch": model.tokenizer.has_thinking_switch,
        "max_body_bytes": service.settings.max_body_bytes,
        "facts": table,
        "opening": facts.opening,
        "examples": facts.examples,
        "limits": facts.limits,
        "sampling": [sampling_field(name, *words, model) for name, words in SAMPLING.items()],
    }


def sampling_field(name: str, label: str, hint: str, model: ServedModel) -> dict[str, Any]:
    """Bounds are those that the chat route checks."""
    info = SamplingFields.model_fields[name]
    bounds = {
        key: getattr(m, key) for m in info.metadata for key in ("ge", "gt", "le") if hasattr(m, key)
    }
    value: Any = getattr(
        model.defaults, {"thinking_token_budget": "max_thinking_tokens"}.get(name, name)
    )
    if name == "max_tokens":
        value = min(value, model.max_positions)
    return {
        "name": name,
        "label": label,
        "hint": hint,
        "kind": "text"
        if name == "stop"
        else "whole"
        if "int" in str(info.annotation)
        else "number",
        "min": bounds.get("ge", bounds.get("gt")),
        "is_open": "gt" in bounds,
        "max": bounds.get("le") if bounds.get("le", 0) < 10**9 else None,
        "default": str(value) if value not in (None, ()) else UNSET.get(name, "off"),
    }
