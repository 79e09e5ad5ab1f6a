"""Conversations: checked, rendered by a Jinja template, and safe from forged special tokens.

A user may type `<｜Assistant｜>`; only the template may speak with that token. Before rendering, a
mark is put inside each special token's name that occurs in a message or a tool. What still reads
as a special token in the rendered text is the template's own; without the marks the rest is
ordinary text. `<think>` and `</think>` in an assistant's content are left alone: the model writes
them itself, and they separate no turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.files import NOT_JSON
from rorqual.tokenizer.kept import check_kept
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END
from rorqual.tokenizer.templates import (
    THINKING_SWITCHES,
    call_form,
    reasoning_marks,
    run_template,
    variables_of,
)
from rorqual.tokenizer.tool_calls import render_tools, to_json

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MARK = "\ufdd0"
"""A Unicode noncharacter: it never stands for text, and is repeated if a message has it anyhow."""

_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_REASONING_MARKS = re.compile(rf"(?:(?:{THINK_BEGIN}|{THINK_END})\s*)+\Z")


def check_messages(messages: Sequence[Message]) -> None:
    """TokenizerError naming the first message that cannot be rendered, and why."""
    if not isinstance(messages, list | tuple):
        raise TokenizerError(
            "the conversation is not a list",
            found=type(messages).__name__,
            expected='[{"role": ..., "content": ...}, ...]',
        )
    if not messages:
        raise TokenizerError("the conversation is empty", expected="at least one message")
    outputs_allowed = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise TokenizerError(
                "is not an object",
                where=where,
                found=type(message).__name__,
                expected='{"role": ..., "content": ...}',
            )
        role = message.get("role")
        if role not in ROLES:
            raise TokenizerError(
                "has an unknown role",
                where=where,
                found=repr(role),
                expected=", ".join(ROLES),
                fix="name the speaker by one of these roles",
            )
        _check_content(message, where)
        _check_prefix(message, where, is_last=index == len(messages) - 1)
        if role == "tool" and not outputs_allowed:
            raise TokenizerError(
                "is a tool's output, but no tool was called before it",
                where=where,
                expected="an assistant message with tool_calls, then one tool message a call",
            )
        if role != "system":
            outputs_allowed = role == "tool" or bool(message.get("tool_calls"))


def _check_content(message: Message, where: str) -> None:
    content, calls = message.get("content"), message.get("tool_calls")
    reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str | None):
        raise TokenizerError(
            "has no text in 'reasoning_content'", where=where, found=type(reasoning).__name__
        )
    if calls:
        _check_tool_calls(message["role"], calls, where)
        if content is None:
            return
    if not isinstance(content, str):
        raise TokenizerError(
            "has no text in 'content'",
            where=where,
            found="nothing" if content is None else type(content).__name__,
            expected="a string (an assistant's may be null beside tool_calls)",
        )
    for text in (content, reasoning or ""):
        if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
            raise TokenizerError(
                "holds half of a surrogate pair, which is no text",
                where=where,
                fix="decode the source with errors='replace'",
            )


def _check_prefix(message: Message, where: str, *, is_last: bool) -> None:
    if not message.get("prefix"):
        return
    if message["role"] != "assistant" or not is_last or message.get("tool_calls"):
        raise TokenizerError(
            "cannot have 'prefix': true",
            where=where,
            expected="it only on the last message, an assistant's without tool_calls",
            fix="remove 'prefix'",
        )


def _check_tool_calls(role: str, calls: object, where: str) -> None:
    if role != "assistant":
        raise TokenizerError(f"role {role!r} cannot have 'tool_calls'", where=where)
    if not isinstance(calls, list):
        raise TokenizerError("'tool_calls' is not a list", where=where, found=type(calls).__name__)
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        arguments = _function_of(call, place).get("arguments")
        if not isinstance(arguments, str | dict):
            raise TokenizerError(
                "has no 'arguments'",
                where=place,
                found=repr(arguments),
                expected="JSON as a string, or an object",
            )


def check_tools(tools: Sequence[dict[str, Any]]) -> None:
    """TokenizerError naming the first tool definition that is not in OpenAI's shape."""
    if not isinstance(tools, list | tuple):
        raise TokenizerError(
            "is not a list",
            where="tools",
            found=repr(tools)[:80],
            expected='[{"type": "function", "function": {"name": ...}}, ...]',
        )
    for index, tool in enumerate(tools):
        _function_of(tool, f"tools[{index}]")


def _function_of(value: object, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise TokenizerError(
            "is not a function",
            where=where,
            found=repr(value)[:80],
            expected='{"type": "function", "function": {"name": ...}}',
        )
    if not _FUNCTION_NAME.fullmatch(name):
        raise TokenizerError(
            "has a function name that cannot be written in a prompt",
            where=where,
            found=repr(name),
            expected="letters, digits, '_', '-', '.'",
        )
    return function


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool,
    thinking: bool | None,
    special: re.Pattern[str],
    names: dict[str, str | None],
) -> tuple[str, str]:
    """(rendered text, mark): remove each `mark` from the text to get what a person should read.

    `thinking` None leaves the choice to the template. `special` matches the special tokens; `names`
    are variables for the template (`bos_token` ...).
    Raises TokenizerError for messages or tools that cannot be rendered.
    """
    check_messages(messages)
    check_tools([] if tools is None else tools)
    try:
        plain = [_in_form(message, index, template) for index, message in enumerate(messages)]
        mark = _unused_mark([plain, tools])
        safe = [_mark_message(message, special, mark) for message in plain]
        safe_tools = _map_text(list(tools), _marker(special, mark)) if tools else None
    except RecursionError:
        raise TokenizerError(
            "the conversation or its tools are nested too deeply",
            expected="lists and objects in each other a few hundred deep at most",
        ) from None
    shown = safe
    last, hole = safe[-1], mark * 2
    if is_prefix := bool(last.get("prefix")):
        safe = safe[:-1]
        open_end = {key: value for key, value in last.items() if key != "reasoning_content"}
        shown = [*safe, open_end | {"content": hole}]
    if safe_tools and "tools" not in variables_of(template):
        after_system = [m for m in shown if m["role"] == "system"]
        after_system.append({"role": "system", "content": render_tools(safe_tools)})
        shown = after_system + [m for m in shown if m["role"] != "system"]
    variables = {
        "messages": shown,
        "tools": safe_tools,
        "add_generation_prompt": add_generation_prompt and not is_prefix,
        **names,
    }
    if thinking is not None:
        variables |= dict.fromkeys(THINKING_SWITCHES, thinking)
    text = run_template(template, variables)
    if is_prefix:
        text = _continued(text, hole, last, template)
    check_kept(text, safe, safe_tools or [])
    return text, mark


def _in_form(message: Message, index: int, template: str) -> Message:
    """The message with its calls as the template wants them; without empty lists of calls."""
    if not message.get("tool_calls"):
        return {key: value for key, value in message.items() if key != "tool_calls"}
    form = call_form(template)
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        if form.is_text and not isinstance(arguments, str):
            arguments = to_json(arguments)
        elif not form.is_text and isinstance(arguments, str):
            arguments = _object_of(arguments, f"messages[{index}].tool_calls[{number}]")
        calls.append(
            {"type": "function", **call, "function": {**call["function"], "arguments": arguments}}
        )
    content = form.empty if message.get("content") is None else message["content"]
    return {**message, "content": content, "tool_calls": calls}


def _object_of(arguments: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except NOT_JSON:
        value = None
    if not isinstance(value, dict):
        raise TokenizerError(
            "has arguments that this model's chat template cannot write",
            where=where,
            found=arguments[:80],
            expected="a JSON object",
        )
    return value


def _continued(text: str, hole: str, last: Message, template: str) -> str:
    """The prompt with its last message left open; `hole` stands in `text` for what it says.

    So templates that leave reasoning out, or do not know `prefix`, lose nothing of it.
    """
    at = text.find(hole)
    if at < 0:
        raise TokenizerError(
            "the chat template leaves out the message that is to be continued",
            fix="leave out 'prefix', or use another chat template",
        )
    content, reasoning = last["content"] or "", last.get("reasoning_content")
    begin, end = reasoning_marks(template)
    if reasoning is not None:
        content = begin + reasoning + (end + content if content else "")
    elif not content.lstrip().startswith(THINK_BEGIN):
        return text[:at] + content
    # The message opens its reasoning itself: what the template put there goes.
    return _REASONING_MARKS.sub("", text[:at]) + content


def _mark_message(message: Message, special: re.Pattern[str], mark: str) -> Message:
    if message["role"] != "assistant":
        return {key: _map_text(value, _marker(special, mark)) for key, value in message.items()}
    keep = {"content": (THINK_BEGIN, THINK_END)}
    return {
        key: _map_text(value, _marker(special, mark, keep.get(key, ())))
        for key, value in message.items()
    }


def _marker(
    special: re.Pattern[str], mark: str, keep: tuple[str, ...] = ()
) -> Callable[[str], str]:
    def replace(match: re.Match[str]) -> str:
        name = match[0]
        return name if name in keep else name[0] + mark + name[1:]

    return lambda text: special.sub(replace, text)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(str(key)): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(item, change) for item in value]
    return value


def _unused_mark(values: Any) -> str:
    """MARK, repeated until it is longer than any run of it in the text."""
    longest = 0

    def measure(text: str) -> str:
        nonlocal longest
        for run in re.findall(f"{MARK}+", text):
            longest = max(longest, len(run))
        return text

    _map_text(values, measure)
    return MARK * (longest + 1)
