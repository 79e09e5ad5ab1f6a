"""Conversations as files: `/save` and `/load` of the terminal chat.

Both forms are the chat page's (serve/page/export.js), which imports what is saved here. JSON is
what the API and `train` take too: `messages`, with a title and a time beside them. Markdown has a
heading for each message, which a comment marks; such a mark within a message gets a backslash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rorqual.errors import UsageError
from rorqual.files import NOT_JSON, atomic_write, explained, read_text

Message = dict[str, str]
MAX_TITLE_CHARACTERS = 60
HEADINGS = {"system": "System", "user": "You", "assistant": "Answer"}
_MARK = re.compile(r"^#{1,2} .* <!-- rorqual (chat|system|user|assistant) -->$", re.MULTILINE)
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say it, no file in UTF-8 can hold it
FIX = "save one with /save to see the form"


def write_chat(path: Path, messages: Sequence[Message]) -> None:
    """As Markdown where the name ends in .md, else as JSON. UsageError where it cannot be."""
    text = _as_markdown(messages) if _is_markdown(path) else _as_json(messages)
    try:
        with atomic_write(path, "w") as file:
            file.write(text)
    except OSError as problem:
        raise explained(problem, UsageError, path) from None


def read_chat(path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """The system text and the turns; a last message without an answer has an empty one.

    UsageError for what is no conversation of a user and an assistant by turns.
    """
    text = read_text(path, UsageError)
    messages = _from_markdown(text, path) if _is_markdown(path) else _from_json(text, path)
    system = None
    turns: list[list[str]] = []  # a question, then its answer
    for number, message in enumerate(messages):
        role, content = _read_message(message, f"{path}: messages[{number}]")
        expected = "assistant" if turns and len(turns[-1]) == 1 else "user"
        if role == "system" and number == 0:
            system = content
        elif role == "user" == expected:
            turns.append([content])
        elif role == "assistant" == expected:
            turns[-1].append(content)
        else:
            raise UsageError(
                "messages are a system text, then a user's and an assistant's by turns",
                where=f"{path}: messages[{number}]",
                found=f"role {role!r}",
                expected=f"role {expected!r}",
                fix=FIX,
            )
    if not turns and system is None:
        raise UsageError("there is no message in it", where=path, fix=FIX)
    return system, [(turn[0], turn[1] if len(turn) > 1 else "") for turn in turns]


def title_of(messages: Sequence[Message]) -> str:
    """The beginning of the first question."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    text = " ".join(said[0].split()) if said else ""
    if len(text) > MAX_TITLE_CHARACTERS:
        text = text[: MAX_TITLE_CHARACTERS - 1].rstrip() + "…"
    return text or "New chat"


def _is_markdown(path: Path) -> bool:
    return path.suffix.lower() in (".md", ".markdown")


def _as_json(messages: Sequence[Message]) -> str:
    exported_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    content = {
        "title": title_of(messages),
        "exportedAt": exported_at.replace("+00:00", "Z"),
        "messages": messages,
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _from_json(text: str, path: Path) -> list[Any]:
    try:
        value = json.loads(text)
    except NOT_JSON as problem:
        raise UsageError(f"is not valid JSON: {problem}", where=path, fix=FIX) from None
    messages = value.get("messages") if isinstance(value, dict) else value
    if isinstance(value, dict) and messages is None and isinstance(value.get("chats"), list):
        raise _many(len(value["chats"]), path)
    if not isinstance(messages, list):
        raise UsageError(
            "has no messages",
            where=path,
            found=type(messages if isinstance(value, dict) else value).__name__,
            expected='a list, or an object with a list "messages"',
            fix=FIX,
        )
    return messages


def _read_message(message: Any, where: str) -> tuple[str, str]:
    """(role, text) of one of OpenAI's messages; UsageError for what a terminal cannot say."""
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    role = "system" if role == "developer" else role
    is_known = isinstance(role, str) and role in HEADINGS and not message.get("tool_calls")
    if not is_known or not isinstance(content, str) or SURROGATE.search(content):
        raise UsageError(
            "is no message of this chat",
            where=where,
            found=json.dumps(message)[:80],
            expected="a role (system, user or assistant) and a whole text as content, no tools",
            fix=FIX,
        )
    return str(role), content


def _as_markdown(messages: Sequence[Message]) -> str:
    parts = [f"# {title_of(messages)} <!-- rorqual chat -->"]
    for message in messages:
        role, content = message["role"], message["content"]
        content = re.sub(r"<!-- (\\*)rorqual", r"<!-- \\\1rorqual", content)
        parts += [f"## {HEADINGS[role]} <!-- rorqual {role} -->", content]
    return "\n\n".join(parts) + "\n"


def _from_markdown(text: str, path: Path) -> list[Message]:
    """What `_as_markdown` writes: role and text by turns after the title."""
    _, *parts = _MARK.split(text.removesuffix("\n") + "\n\n")
    roles, contents = parts[::2], parts[1::2]
    if roles.count("chat") > 1:
        raise _many(roles.count("chat"), path)
    return [
        {"role": role, "content": re.sub(r"<!-- \\(\\*)rorqual", r"<!-- \1rorqual", content[2:-2])}
        for role, content in zip(roles, contents, strict=True)
        if role != "chat"
    ]


def _many(num: int, path: Path) -> UsageError:
    return UsageError(
        "holds more than one chat", where=path, found=f"{num} chats", fix="export one of them alone"
    )
