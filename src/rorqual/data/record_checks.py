"""Checks of a record of a corpus: each fault names the file, the line and the mend."""

from __future__ import annotations

from typing import Any

from rorqual.errors import DataError, TokenizerError
from rorqual.tokenizer.chat import check_messages, check_tools


def check_conversation(messages: Any, tools: Any, where: object) -> None:
    """DataError unless a chat template can write these messages with these tools."""
    _check_messages(messages, where)
    try:
        if tools is not None and not isinstance(tools, list):
            found = type(tools).__name__
            raise TokenizerError("tools is not a list", found=found, expected="[...]")
        check_messages(messages)
        check_tools(tools or [])
    except TokenizerError as problem:
        raise DataError(
            problem.what,
            where=f"{where}: {problem.where}" if problem.where else where,
            found=problem.found,
            expected=problem.expected,
            fix=f"{problem.fix or 'correct or remove the line'} (docs/training.md has the form)",
        ) from None


def mend_of_keys(record: dict[str, Any]) -> str:
    """What helps where neither text nor messages is there: another program's form, or a name."""
    if "conversations" in record:
        return (
            'rewrite ShareGPT\'s form: "conversations" as "messages", "from" as "role" (human: '
            'user, gpt: assistant), "value" as "content"'
        )
    return 'name the column of text "text"; write a conversation as "messages" (docs/training.md)'


def check_text(text: object, key: str, where: object) -> None:
    if not isinstance(text, str):
        raise DataError(
            f"{key} is not a string",
            where=where,
            found=type(text).__name__,
            expected="a string",
            fix="correct or remove the line",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{key} holds half a surrogate pair, which UTF-8 cannot write",
            where=where,
            fix="replace the broken character",
        ) from None


def _check_messages(messages: object, where: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            "messages is not a list with something in it",
            where=where,
            found=type(messages).__name__ if not isinstance(messages, list) else "[]",
            expected='[{"role": "user", "content": "..."}, ...]',
            fix="correct or remove the line",
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"message {index} has no role",
                where=where,
                expected='{"role": "user", "content": "..."}',
                fix="correct or remove the line",
            )
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        check_text(content, f"the content of message {index}", where)
