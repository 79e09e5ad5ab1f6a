"""A row of the table of fields (`fields.py`), and the places that have fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["honoured", "ignored", "noted", "refused"]

CHAT, COMPLETIONS = "chat", "completions"
MESSAGES, PARTS, CALLS, TOOLS = "messages[]", "messages[].content[]", "tool_calls[]", "tools[]"
FUNCTIONS = "tools[].function"
STRUCTURED = "structured_outputs"
RESPONSES, INPUT_TOKENS = "responses", "responses/input_tokens"
RESPONSE_ITEMS, RESPONSE_PARTS = "responses: input[]", "responses: input[].content[]"
RESPONSE_TOOLS, RESPONSE_TEXT = "responses: tools[]", "responses: text"
RESPONSE_REASONING = "responses: reasoning"
CLAUDE, COUNT_TOKENS = "messages", "messages/count_tokens"
CLAUDE_BLOCKS, CLAUDE_TOOLS = "messages: blocks", "messages: tools[]"
CLAUDE_OUTPUT = "messages: output_config"
ROUTES = (CHAT, COMPLETIONS)


@dataclass(frozen=True, kw_only=True)
class FieldRow:
    """`place` is the object that has the field: a route's body or a part of one.

    `off` are values beside null that ask for nothing, `example` is one that asks for something; of
    a name with dots or brackets it is a whole change of the body. `values` tells the range.
    """

    place: str
    name: str
    servers: str
    fate: Fate
    example: Any = None
    off: tuple[Any, ...] = ()
    note: str = ""
    values: str = ""

    def is_off(self, value: Any) -> bool:
        # True is 1 to Python, but not to JSON.
        return value is None or any(
            value == off and isinstance(value, bool) == isinstance(off, bool) for off in self.off
        )


def rows(places: str | tuple[str, ...], **values: Any) -> Iterator[FieldRow]:
    for place in (places,) if isinstance(places, str) else places:
        yield FieldRow(place=place, **values)


def honoured(
    places: str | tuple[str, ...],
    servers: str,
    name: str,
    example: Any,
    values: str = "",
    note: str = "",
) -> Iterator[FieldRow]:
    yield from rows(
        places,
        name=name,
        servers=servers,
        fate="honoured",
        example=example,
        values=values,
        note=note,
    )


def without_effect(
    servers: str,
    names: str,
    *off: Any,
    places: str | tuple[str, ...] = ROUTES,
    is_noted: bool = False,
) -> Iterator[FieldRow]:
    """Of what is noted, `off` are the values that ask for nothing."""
    fate: Fate = "noted" if is_noted else "ignored"
    for name in names.split():
        yield from rows(places, name=name, servers=servers, fate=fate, off=off)


def refused(
    servers: str,
    name: str,
    example: Any,
    *off: Any,
    note: str = "",
    places: str | tuple[str, ...] = ROUTES,
) -> Iterator[FieldRow]:
    yield from rows(
        places,
        name=name,
        servers=servers,
        fate="refused",
        example=example,
        off=off,
        note=note,
    )
