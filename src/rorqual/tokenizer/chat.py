"""Conversations: checked, rendered by a Jinja template, and safe from forged special tokens.

A user may type `<｜Assistant｜>`; only the template may speak with that token. Before rendering, a
mark is put inside each special token's name that occurs in a message or a tool. What still reads
as a special token in the rendered text is the template's own; without the marks the rest is
ordinary text. `<think>` and `</think>` in an assistant's content are left alone: the model writes
them itself, and they separate no turns.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.tokenizer.special import EOS, THINK_BEGIN, THINK_END
from rorqual.tokenizer.tool_calls import render_tools, to_json

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MARK = "\ufdd0"
"""A Unicode noncharacter: it never stands for text, and is repeated if a message has it anyhow."""

THINKING_SWITCHES = ("thinking", "enable_thinking")
"""The variables by which templates are told whether to think: V3.1's, and most others'."""

_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@functools.cache
def v3_template() -> str:
    """The text of `chat_template.jinja`."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def is_published_v3_template(template: str) -> bool:
    """Whether this is the template that V3's checkpoints carry, whose tool calls are faulty."""
    return "is_output_first" in template and "tool▁calls" in template and "think" not in template


@functools.lru_cache(maxsize=8)
def has_thinking_switch(template: str) -> bool:
    """Whether the template reads a variable that turns thinking on or off."""
    from jinja2 import TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    try:
        names = find_undeclared_variables(_environment().parse(template))
    except TemplateSyntaxError:  # rendering says what is wrong
        return False
    return not names.isdisjoint(THINKING_SWITCHES)


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
    if not content.isascii() and content.encode("utf-8", "replace").decode() != content:
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
        mark = _unused_mark([messages, tools])
        safe = [_mark_message(message, special, mark) for message in messages]
        safe_tools = _map_text(list(tools), _marker(special, mark)) if tools else None
    except RecursionError:
        raise TokenizerError(
            "the conversation or its tools are nested too deeply",
            expected="lists and objects in each other a few hundred deep at most",
        ) from None
    if safe_tools and "tools" not in template:
        after_system = [m for m in safe if m["role"] == "system"]
        after_system.append({"role": "system", "content": render_tools(safe_tools)})
        safe = after_system + [m for m in safe if m["role"] != "system"]
    is_prefix = bool(messages[-1].get("prefix"))
    variables = {
        "messages": safe,
        "tools": safe_tools,
        "add_generation_prompt": add_generation_prompt and not is_prefix,
        **names,
    }
    if thinking is not None:
        variables |= dict.fromkeys(THINKING_SWITCHES, thinking)
    text = _run_template(template, variables)
    # A template of another model may not know 'prefix'; the end that it wrote is taken back.
    return text.removesuffix(names.get("eos_token") or EOS) if is_prefix else text, mark


def _run_template(template: str, variables: dict[str, Any]) -> str:
    import jinja2

    try:
        return _compile(template).render(variables)
    except (jinja2.TemplateError, TypeError, ValueError) as problem:
        raise TokenizerError(
            f"the chat template failed: {problem}",
            fix="check the conversation against the template, or remove the template "
            "from the tokenizer's folder to use DeepSeek-V3's",
        ) from None


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # As transformers sets it up, so that a template renders alike in both.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


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
