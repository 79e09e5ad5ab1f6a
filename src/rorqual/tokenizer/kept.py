"""Whether a rendered prompt holds what the messages say: a template may drop text in silence.

What may be missing: white space, an answer's text up to `</think>` and its `reasoning_content`, as
R1's and V3.1's templates leave out what was thought in earlier turns. Templates may write a text as
JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.files import NOT_JSON
from rorqual.tokenizer.special import THINK_END


def check_kept(
    prompt: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> None:
    """TokenizerError naming the first message or tool whose text the prompt does not hold.

    Messages are looked for in their order, but for system messages, which may have been moved.
    """
    starts = {True: 0, False: 0}
    for index, message in enumerate(messages):
        is_system = message["role"] == "system"
        start = starts[is_system]
        content = message["content"] or ""
        if message["role"] == "assistant":
            content = content.rpartition(THINK_END)[2]
        end = _end_of(content, prompt, start)
        if end < 0:
            raise _lost(f"messages[{index}]", content)
        for number, call in enumerate(message.get("tool_calls", [])):
            for text in _texts_of(call, prompt, start):
                if _end_of(text, prompt, start) < 0:
                    raise _lost(f"messages[{index}].tool_calls[{number}]", text)
            # Thousands of calls would each be looked for from the beginning. No template changes
            # a name, so its first place is not behind its own.
            start = _end_of(call["function"]["name"], prompt, start)
        starts[is_system] = max(start, end)
    for index, tool in enumerate(tools):
        if tool["function"]["name"] not in prompt:
            raise _lost(f"tools[{index}]", tool["function"]["name"])


def _end_of(text: str, prompt: str, start: int) -> int:
    """Where `text`, or what a template may make of it, ends in the prompt; -1 without it."""
    text = text.strip()
    for form in (text, _inside_quotes(text, False), _inside_quotes(text, True)):
        if (at := prompt.find(form, start)) >= 0:
            return at + len(form)
    is_there = _without_space(text) in _without_space(prompt[start:])
    return start if is_there else -1


def _inside_quotes(text: str, ensure_ascii: bool) -> str:
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def _without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _texts_of(call: dict[str, Any], prompt: str, start: int) -> Iterator[str]:
    """A call's name, and each text in its arguments unless they stand there as they are."""
    yield call["function"]["name"]
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, str):
        yield from _leaves(arguments)
    elif prompt.find(arguments, start) < 0:
        try:
            yield from _leaves(json.loads(arguments))
        except NOT_JSON:
            yield arguments


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _lost(where: str, text: str) -> TokenizerError:
    return TokenizerError(
        "is left out of the prompt by this model's chat template",
        where=where,
        found=text.strip()[:80],
        fix="say it in another way, or use another chat template",
    )
