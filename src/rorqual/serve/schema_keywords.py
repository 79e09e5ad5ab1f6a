"""JSON schemas made to what a grammar can enforce: of one that is not strict the rest is dropped,
and the reply names it; with `strict: true` it is an error.

What llguidance 1.9 enforces was tried keyword by keyword; a test tries again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rorqual.serve.errors import ApiError
from rorqual.serve.notes import Notes
from rorqual.serve.schemas_chat import ChatRequest, NamedTool
from rorqual.serve.schemas_forms import FormFields, JsonSchemaFormat, ResponseFormat, TextFormat

UNENFORCED = frozenset(
    "uniqueItems not if then else contains minContains maxContains propertyNames dependentRequired "
    "dependentSchemas dependencies unevaluatedProperties unevaluatedItems $dynamicRef "
    "$recursiveRef".split()
)
FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split()
)
SCHEMAS = ("items", "additionalProperties", "additionalItems")
LISTS = ("prefixItems", "anyOf", "allOf", "oneOf", "items")
TABLES = ("properties", "patternProperties", "$defs", "definitions")
BEYOND_REGULAR = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9]")
"""Look-around and references back, which the automata of grammars do not have."""


@dataclass
class _Reader:
    """Goes through one schema. `dropped` are the keywords that cannot be enforced."""

    dropped: dict[str, None]
    is_strict: bool

    def read(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        found: dict[str, Any] = {}
        for key, value in schema.items():
            if key in TABLES and isinstance(value, dict):
                found[key] = self._table(key, value)
            elif key in SCHEMAS and isinstance(value, dict):
                found[key] = self.read(value)
            elif key in LISTS and isinstance(value, list):
                found[self._list_name(key, schema)] = [self.read(item) for item in value]
            elif not self._is_dropped(key, value):
                found[key] = value
        return found

    def _table(self, key: str, table: dict[str, Any]) -> dict[str, Any]:
        is_pattern = key == "patternProperties"
        return {
            name: self.read(value)
            for name, value in table.items()
            if not (is_pattern and self._is_dropped("pattern", name))
        }

    def _list_name(self, key: str, schema: dict[str, Any]) -> str:
        """Alternatives that may overlap cannot be told apart: any of them is taken then."""
        if key != "oneOf" or self.is_strict or "anyOf" in schema:
            return key
        self.dropped["oneOf"] = None
        return "anyOf"

    def _is_dropped(self, key: str, value: Any) -> bool:
        if key in UNENFORCED:
            if value is not False:  # `uniqueItems: false` asks for nothing
                self.dropped[key] = None
            return True
        is_beyond = key == "pattern" and isinstance(value, str) and BEYOND_REGULAR.search(value)
        if is_beyond or (key == "format" and value not in FORMATS):
            self.dropped[key] = None
            return True
        return False


def enforceable(
    schema: dict[str, Any], place: str, notes: Notes, *, is_strict: bool
) -> dict[str, Any]:
    """The schema without what cannot be enforced, which is noted; if strict, ApiError 422."""
    reader = _Reader({}, is_strict)
    found: dict[str, Any] = reader.read(schema)
    if reader.dropped and is_strict:
        names = ", ".join(map(repr, reader.dropped))
        message = f"{place}: {names} cannot be enforced; without strict: true it is ignored"
        raise ApiError(422, message, code="unsupported", param=place)
    for name in reader.dropped:
        notes.ignore(f"{place}.{name}")
    return found


def enforceable_form(body: FormFields) -> ResponseFormat | None:
    """The answer's form, whose schema has only what a grammar can enforce."""
    wanted = body.response_format
    inner = wanted.json_schema if isinstance(wanted, JsonSchemaFormat) else None
    if wanted is None or inner is None or inner.json_schema is None:
        return wanted
    schema = enforceable(
        inner.json_schema, body.schema_place, body.notes, is_strict=bool(inner.strict)
    )
    inner = inner.model_copy(update={"json_schema": schema})
    return wanted.model_copy(update={"json_schema": inner})


def enforceable_body(body: ChatRequest) -> ChatRequest:
    """A copy for grammars, whose schemas have only what these can enforce."""
    changes: dict[str, Any] = {"response_format": enforceable_form(body)}
    if body.tools and _has_bound_calls(body):
        tools = []
        for index, tool in enumerate(body.tools):
            function = tool.function
            if function.parameters is not None:
                place = f"tools[{index}].function.parameters"
                is_strict = bool(function.strict)
                schema = enforceable(function.parameters, place, body.notes, is_strict=is_strict)
                function = function.model_copy(update={"parameters": schema})
            tools.append(tool.model_copy(update={"function": function}))
        changes["tools"] = tools
    return body.model_copy(update=changes)


def _has_bound_calls(body: ChatRequest) -> bool:
    """Whether a grammar will hold calls to their schemas."""
    if body.tool_choice == "none":
        return False
    if body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool):
        return True
    has_form = body.response_format is not None and not isinstance(body.response_format, TextFormat)
    return has_form or any(tool.function.strict for tool in body.tools or [])
