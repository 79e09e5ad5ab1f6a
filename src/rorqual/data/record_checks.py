"""Checks of a record of a corpus: each fault names the file, the line and the mend."""

from __future__ import annotations

from typing import Any

from rorqual.errors import DataError, TokenizerError
from rorqual.tokenizer.chat import check_messages, check_tools


def check_conversation(messages: Any, tools: Any, where: object) -> None:
    """DataError unless a chat template can write these messages with these tools."""
    try:
        check_messages(messages)
        check_tools(tools or [])
    except TokenizerError as problem:
        raise problem.with_(
            where=f"{where}: {problem.where}" if problem.where else where,
            error=DataError,
            fix=f"{problem.fix or 'correct or remove the line'} (docs/own-data.md has the form)",
        ) from None


def mend_of_keys(record: dict[str, Any]) -> str:
    """What helps where neither text nor messages is there: another program's form, or a name."""
    if "conversations" in record:
        return (
            'rewrite ShareGPT\'s form: "conversations" as "messages", "from" as "role" (human: '
            'user, gpt: assistant), "value" as "content"'
        )
    return 'name the column of text "text"; write a conversation as "messages" (docs/own-data.md)'


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
