"""Whether a request wants the model to think first: servers have five ways to say so.

The nearest to the template counts: `chat_template_kwargs`, then `thinking` (a boolean, or
DeepSeek's object), then `reasoning` (OpenRouter's and SGLang's), then `reasoning_effort`, of which
`none` and `minimal` mean not to.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.serve.errors import ApiError
from rorqual.serve.notes import Notes
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.templates import THINKING_SWITCHES

NO_EFFORT = ("none", "minimal")


@dataclass(frozen=True)
class ThinkingWish:
    """`place` is the field that says so."""

    is_on: bool
    place: str


def thinking_wish(body: ChatRequest) -> ThinkingWish | None:
    """What the request says; None if nothing. ApiError 422 for what is neither true nor false."""
    for name in THINKING_SWITCHES:
        value = (body.chat_template_kwargs or {}).get(name)
        if value is not None:
            place = f"chat_template_kwargs.{name}"
            if not isinstance(value, bool):
                raise ApiError(422, f"{place} is no boolean", code="invalid_value", param=place)
            return ThinkingWish(value, place)
    if body.thinking is not None:
        is_on = body.thinking if isinstance(body.thinking, bool) else body.thinking.is_on
        return ThinkingWish(is_on, "thinking")
    reasoning = body.reasoning
    if reasoning is not None and reasoning.enabled is not None:
        return ThinkingWish(reasoning.enabled, "reasoning")
    if reasoning is not None and reasoning.effort is not None:
        return ThinkingWish(reasoning.effort not in NO_EFFORT, "reasoning")
    if body.reasoning_effort is not None:
        return ThinkingWish(body.reasoning_effort not in NO_EFFORT, "reasoning_effort")
    return None


def thinking_switch(body: ChatRequest, tokenizer: Tokenizer, notes: Notes) -> bool | None:
    """How the template is to be set; what it cannot be told is noted as without effect."""
    for name in body.chat_template_kwargs or {}:
        if name not in THINKING_SWITCHES:
            notes.ignore(f"chat_template_kwargs.{name}")
    wish = thinking_wish(body)
    if wish is None:
        return None
    if not tokenizer.has_thinking_switch:
        notes.ignore(wish.place)
        return None
    return wish.is_on
