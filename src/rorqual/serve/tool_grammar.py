"""Grammars of answers that are, or may contain, tool calls.

`tool_choice: required` or a named tool makes the answer one or more calls whose arguments follow
the tools' schemas. A tool with `strict: true` binds calls in free answers too: text, then
perhaps calls. Special tokens stand in a grammar by name and never count as text, so a call can only
begin with its token. Reasoning that the prompt began ends before the grammar begins; in an answer
that need not be a call the model may begin it by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rorqual.engine import Grammar
from rorqual.engine.grammar import CALL_OPTIONS, JSON_OPTIONS, WIDE_OPTIONS
from rorqual.serve.errors import ApiError
from rorqual.serve.schemas_chat import ChatRequest, FunctionSchema, NamedTool
from rorqual.serve.schemas_forms import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
    TextFormat,
)
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import (
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)

MARKERS = (TOOL_CALLS_BEGIN, TOOL_CALL_BEGIN, TOOL_SEP, TOOL_CALL_END, TOOL_CALLS_END)
ANY_OBJECT = {"type": "object"}


def chat_grammar(body: ChatRequest, tokenizer: Tokenizer, *, is_thinking: bool) -> Grammar | None:
    """What the answer must look like, if anything; ApiError 422 for what cannot be enforced."""
    tools = [tool.function for tool in body.tools or []] if body.tool_choice != "none" else []
    is_forced = is_call_forced(body)
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.name == name]
    format_grammar = form_grammar(body.response_format)
    has_calls = is_forced or (bool(tools) and (format_grammar is not None or _has_strict(tools)))
    if not has_calls:
        return format_grammar
    if any(marker not in tokenizer.special_ids for marker in MARKERS):
        message = "this model's tokenizer has no tool tokens, so calls cannot be enforced"
        raise ApiError(422, message, code="unsupported", param="tool_choice")
    is_single = isinstance(body.tool_choice, NamedTool) or body.parallel_tool_calls is False
    lines = _calls(tools, is_single=is_single)
    if is_forced:
        answer = "calls"
    elif format_grammar is None:
        answer = "TEXT? calls?"
    else:
        answer = "calls | answer"
        has_whitespace = bool(getattr(body.response_format, "whitespace", None))
        options = WIDE_OPTIONS if has_whitespace else JSON_OPTIONS
        lines.append(f"answer: {_json_rule(_answer_schema(body), options)}")
    lines.append(f"body: {answer}")
    lines.append(r"TEXT: /(.|\n)+/")
    may_think = not is_thinking and not is_forced
    return Grammar("grammar", "\n".join([_start(tokenizer, may_think), *lines]))


def is_call_forced(body: ChatRequest) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def form_grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """What an answer of text must look like."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if isinstance(wanted, JsonObjectFormat):
        return Grammar("json_object", has_whitespace=bool(wanted.whitespace))
    if isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.json_schema
        text = json.dumps(ANY_OBJECT if schema is None else schema)
        return Grammar("json_schema", text, has_whitespace=bool(wanted.whitespace))
    if isinstance(wanted, RegexFormat):
        return Grammar("regex", wanted.regex)
    if isinstance(wanted, ChoiceFormat):
        return Grammar("choice", json.dumps(wanted.choices))
    return Grammar("grammar", wanted.grammar)


def _answer_schema(body: ChatRequest) -> dict[str, Any]:
    wanted = body.response_format
    if isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.json_schema
        return ANY_OBJECT if schema is None else schema
    if isinstance(wanted, RegexFormat | ChoiceFormat | GrammarFormat):
        place = body.written("response_format")
        message = f"{place}: a form of type {wanted.type!r} does not go together with tools"
        raise ApiError(422, message, code="unsupported", param=place)
    return ANY_OBJECT


def _has_strict(tools: Sequence[FunctionSchema]) -> bool:
    return any(tool.strict for tool in tools)


def _start(tokenizer: Tokenizer, may_think: bool) -> str:
    has_think = {THINK_BEGIN, THINK_END} <= set(tokenizer.special_ids)
    is_free = may_think and has_think
    return f"start: ({THINK_BEGIN} TEXT? {THINK_END})? body" if is_free else "start: body"


def _calls(tools: Sequence[FunctionSchema], *, is_single: bool) -> list[str]:
    """The rules of `calls` in V3's format. A named tool is called once, as OpenAI has it, and
    without `parallel_tool_calls` any.
    """
    more = "" if is_single else ' ("\\n" call)*'
    names = " | ".join(f"call_{index}" for index in range(len(tools)))
    lines = [
        f"calls: {TOOL_CALLS_BEGIN} call{more} {TOOL_CALLS_END}",
        f'call: {TOOL_CALL_BEGIN} "function" {TOOL_SEP} ({names}) {TOOL_CALL_END}',
    ]
    for index, tool in enumerate(tools):
        head = json.dumps(f"{tool.name}\n```json\n")
        rule = _json_rule(tool.parameters or ANY_OBJECT, CALL_OPTIONS)
        lines.append(f'call_{index}: {head} arguments_{index} "\\n```"')
        lines.append(f"arguments_{index}: {rule}")
    return lines


def _json_rule(schema: dict[str, Any], options: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": options})
