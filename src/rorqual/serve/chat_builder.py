"""The chat route's request, built from the items of other APIs.

Those routes check what is theirs and leave the rest to the chat route. What it finds at fault is
told by the names of the API that was used: each message remembers the item that it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from rorqual.serve.errors import ApiError, validation_error
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_common import Body


class ChatBuilder:
    """Messages in their order. Parts of one assistant's turn that follow each other become one.

    Texts stay lists of their parts until the end: thousands of parts may make one, and a text that
    grows part by part is copied each time.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._places: list[str] = []

    def add(self, role: str, text: str, place: str) -> None:
        """A system or user message."""
        self._put({"role": role, "content": [text]}, place)

    def add_user_text(self, text: str, place: str) -> None:
        """As `add`, but several of them are one turn, as Anthropic has it."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "user":
            last["content"] += ["\n\n", text]
        else:
            self.add("user", text, place)

    def add_said(self, text: str, place: str) -> None:
        self._turn(place).setdefault("content", []).append(text)

    def add_thought(self, text: str, place: str) -> None:
        self._turn(place).setdefault("reasoning_content", []).append(text)

    def add_call(self, call: dict[str, Any], place: str) -> None:
        """`call` is a tool call in the chat route's shape."""
        self._turn(place).setdefault("tool_calls", []).append(call)

    def add_output(self, call_id: str, text: str, place: str) -> None:
        self._put({"role": "tool", "tool_call_id": call_id, "content": [text]}, place)

    def continue_last(self) -> None:
        """The answer goes on with the last message, if it is an assistant's without calls."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and not last.get("tool_calls"):
            last["prefix"] = True

    def turn_starts(self) -> list[int]:
        """Where a conversation may be cut: at its user's messages."""
        return [at for at, message in enumerate(self.messages) if message["role"] == "user"]

    def from_turn(self, start: int) -> ChatBuilder:
        """What is left when all before `start` goes that is no system message."""
        rest = ChatBuilder()
        for at, (message, place) in enumerate(zip(self.messages, self._places, strict=True)):
            if at >= start or message["role"] == "system":
                rest._put(message, place)
        return rest

    def request(self, fields: Mapping[str, Any]) -> ChatRequest:
        """The chat route's checked form; ValidationError as that route's."""
        given = {name: value for name, value in fields.items() if value is not None}
        messages = [_whole(message) for message in self.messages]
        return ChatRequest.model_validate({"messages": messages, **given})

    def places(self) -> dict[str, str]:
        """Where each of the chat's messages came from."""
        return {f"messages[{index}]": place for index, place in enumerate(self._places)}

    def _put(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self._places.append(place)

    def _turn(self, place: str) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._put({"role": "assistant"}, place)
        return self.messages[-1]


def _whole(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its texts put together."""
    texts = {name: message[name] for name in ("content", "reasoning_content") if name in message}
    if not message.get("tool_calls"):
        texts.setdefault("content", [])  # a turn may be all reasoning
    return message | {name: "".join(parts) for name, parts in texts.items()}


@contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the chat route, with its names of fields replaced: `{"messages[2]": "input[3]"}`.

    `.tool_call_id` as a key is the end of any place.
    """
    try:
        yield
    except ValidationError as problem:
        raise renamed(validation_error(problem.errors()), names) from None
    except ApiError as problem:
        raise renamed(problem, names) from None


def hand_on_notes(chat: ChatRequest, body: Body, names: Mapping[str, str] | None = None) -> None:
    """What had no effect in the chat is told as of the request that it was made from."""
    for place in chat.notes.ignored:
        body.notes.ignore(_renamed_place(place, names or {}))
    body.notes.texts.extend(chat.notes.texts)


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error under other names."""
    if error.param is None:
        return error
    place = _renamed_place(error.param, names)
    message = error.message.replace(error.param, place)
    return ApiError(error.status, message, code=error.code, param=place, headers=error.headers)


def _renamed_place(place: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if old.startswith(".") and place.endswith(old):
            place = place.removesuffix(old) + new
    for old in sorted((name for name in names if name[0] != "."), key=len, reverse=True):
        rest = place[len(old) :]
        if place.startswith(old) and rest[:1] in ("", ".", "["):
            return names[old] + rest
    return place
