"""The items of a response's conversation: given, stored and referred to, and the chat they make."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from rorqual.serve.chat_builder import ChatBuilder
from rorqual.serve.errors import ApiError
from rorqual.serve.lengths import num_chars
from rorqual.serve.responses_assembler import item_id
from rorqual.serve.schemas_responses import (
    MAX_ITEMS,
    AnyItem,
    CustomCallItem,
    CustomOutputItem,
    FunctionCallItem,
    FunctionOutputItem,
    Input,
    ItemReference,
    MessageItem,
    Parts,
    ReasoningItem,
)
from rorqual.serve.store.responses import MAX_CHAIN_BYTES, ResponseStore, StoredResponse

_ITEM_ID = re.compile(r"[a-z]+_(?P<name>[0-9a-f]+)_(?P<input>i?)(?P<number>\d{1,6})")
_ITEM: TypeAdapter[Any] = TypeAdapter(AnyItem)

MAX_STORED_CHARS = 16 * 2**20
"""Of stored items that a request refers to, and of those that it goes on with. A short request may
name a long item ten thousand times, and a conversation grow without an end.
"""


@dataclass(frozen=True)
class Record:
    """What is stored of a response: itself, and the items that its request gave."""

    response: dict[str, Any]
    input: list[dict[str, Any]]

    def text(self) -> str:
        return json.dumps({"response": self.response, "input": self.input}, ensure_ascii=False)

    @classmethod
    def read(cls, stored: StoredResponse) -> Record:
        return cls(**json.loads(stored.body))


class _Stored:
    """Stored items that one request wants, counted, and each response read once."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store, self._owner = store, owner
        self._items: dict[str, dict[str, dict[str, Any]]] = {}
        self._num_items = self._num_chars = self._num_read = 0

    async def items(self, response_id: str, param: str) -> dict[str, dict[str, Any]]:
        """What the response took and gave, by id."""
        if response_id not in self._items:
            stored = await self._store.get(response_id, self._owner)
            self._num_read += len(stored.body)
            self._check(self._num_read > MAX_CHAIN_BYTES, param)
            record = Record.read(stored)
            items = [*record.input, *record.response["output"]]
            self._items[response_id] = {item["id"]: item for item in reversed(items)}
        return self._items[response_id]

    def count(self, items: list[dict[str, Any]], param: str) -> None:
        self._num_items += len(items)
        self._num_chars += num_chars(items)
        is_too_long = self._num_items > MAX_ITEMS or self._num_chars > MAX_STORED_CHARS
        self._check(is_too_long, param)

    def _check(self, is_too_long: bool, param: str) -> None:
        if is_too_long:
            message = (
                f"{param}: the stored items are too many or too long for one request (expected at "
                f"most {MAX_ITEMS:,} items and {MAX_STORED_CHARS:,} characters)"
            )
            raise ApiError(400, message, code="context_length_exceeded", param=param)


async def given_items(
    given: Input | None, response_id: str, store: ResponseStore, owner: str
) -> list[dict[str, Any]]:
    """The items of a request as they are stored: whole, each with an id.

    ApiError 404 for a reference to an item that is not stored.
    """
    stored = _Stored(store, owner)
    if isinstance(given, str):
        given = [MessageItem(role="user", content=given)]
    items = []
    for number, item in enumerate(given or []):
        if isinstance(item, ItemReference):
            items.append(await _referred(item.id, f"input[{number}].id", stored))
            continue
        body = item.model_dump(exclude_none=True, by_alias=True)
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            body["content"] = [{"type": kind, "text": item.content}]
        body["id"] = item.id or item_id(item.type, response_id, number, is_input=True)
        items.append(body)
    return items


async def earlier_items(
    response_id: str | None, store: ResponseStore, owner: str
) -> list[dict[str, Any]]:
    """The conversation up to and with a stored response; its instructions are not part of it.

    ApiError `previous_response_not_found`.
    """
    if response_id is None:
        return []
    items: list[dict[str, Any]] = []
    counted = _Stored(store, owner)
    for stored in await store.chain(response_id, owner):
        record = Record.read(stored)
        new = [*record.input, *record.response["output"]]
        counted.count(new, "previous_response_id")
        items += new
        await asyncio.sleep(0)  # others are answered between them
    return items


def add_items(builder: ChatBuilder, items: list[dict[str, Any]], place: str | None = None) -> None:
    """`place` is that of all of them; None: they are the request's `input`."""
    for number, raw in enumerate(items):
        _add(builder, _ITEM.validate_python(raw), place or f"input[{number}]")


def _add(builder: ChatBuilder, item: Any, place: str) -> None:
    if isinstance(item, MessageItem):
        text = _text(item.content)
        if item.role == "assistant":
            builder.add_said(text, place)
        else:
            builder.add("user" if item.role == "user" else "system", text, place)
    elif isinstance(item, ReasoningItem):
        if item.content:
            builder.add_thought("".join(part.text for part in item.content), place)
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        builder.add_call(call, place)
    elif isinstance(item, CustomCallItem):
        custom = {"name": item.name, "input": item.input}
        builder.add_call({"id": item.call_id, "type": "custom", "custom": custom}, place)
    else:
        is_output = isinstance(item, FunctionOutputItem | CustomOutputItem)
        assert is_output, "references have been looked up"
        builder.add_output(item.call_id, _text(item.output), place)


def _text(content: Parts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


async def _referred(reference: str, place: str, stored: _Stored) -> dict[str, Any]:
    found = _ITEM_ID.fullmatch(reference)
    if found is not None:
        try:
            items = await stored.items(f"resp_{found['name']}", place)
        except ApiError as problem:
            if problem.status != 404:
                raise
        else:
            if (item := items.get(reference)) is not None:
                stored.count([item], place)
                return dict(item)
    message = f"{place}: there is no stored item {reference[:100]!r}"
    raise ApiError(404, message, code="item_not_found", param=place)
