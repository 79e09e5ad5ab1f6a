"""Keywords of JSON schemas. Oracle: llguidance itself, asked for each."""

from __future__ import annotations

import json
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live

from rorqual.engine.grammar import Grammar, GrammarCompiler
from rorqual.errors import UsageError
from rorqual.serve.errors import ApiError
from rorqual.serve.notes import IGNORED_HEADER, Notes
from rorqual.serve.schema_keywords import FORMATS, UNENFORCED, enforceable
from rorqual.tokenizer import Tokenizer

TEXT: dict[str, Any] = {"type": "string"}
SHORT = TEXT | {"maxLength": 2}
EXAMPLES: dict[str, Any] = {
    "uniqueItems": True,
    "minContains": 1,
    "maxContains": 1,
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "dependencies": {"a": ["b"]},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
}
OTHER_FORMATS = "uri-reference iri json-pointer regex int32 float byte password phone".split()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def is_enforced(compiler: GrammarCompiler, schema: Any) -> bool:
    try:
        compiler.compile(Grammar("json_schema", json.dumps(schema)))
    except UsageError:
        return False
    return True


def dropped(schema: dict[str, Any]) -> tuple[dict[str, Any], str]:
    notes = Notes()
    found = enforceable(schema, "s", notes, is_strict=False)
    return found, notes.headers().get(IGNORED_HEADER, "")


@pytest.mark.parametrize("keyword", sorted(UNENFORCED))
def test_the_library_enforces_none_of_these(compiler: GrammarCompiler, keyword: str) -> None:
    kind = "array" if "tems" in keyword or "ontains" in keyword else "object"
    schema = {"type": kind, keyword: EXAMPLES.get(keyword, {"type": "string"})}
    assert not is_enforced(compiler, schema)
    found, names = dropped(schema)
    assert is_enforced(compiler, found)
    assert found == {"type": kind}
    assert names == ("s." + keyword if EXAMPLES.get(keyword) is not False else "")
    if names:
        with pytest.raises(ApiError, match="cannot be enforced") as caught:
            enforceable(schema, "s", Notes(), is_strict=True)
        assert (caught.value.status, caught.value.param) == (422, "s")


@pytest.mark.parametrize("name", [*sorted(FORMATS), *OTHER_FORMATS])
def test_formats(compiler: GrammarCompiler, name: str) -> None:
    schema = {"type": "string", "format": name}
    assert is_enforced(compiler, schema) == (name in FORMATS)
    assert dropped(schema) == ((schema, "") if name in FORMATS else (TEXT, "s.format"))


@pytest.mark.parametrize(
    ("schema", "left", "names"),
    [
        ({"type": "array", "uniqueItems": False}, {"type": "array"}, ""),
        (TEXT | {"pattern": "^(?!a)b$"}, TEXT, "s.pattern"),
        (TEXT | {"pattern": r"^(a)\1$"}, TEXT, "s.pattern"),
        (TEXT | {"pattern": r"^a\d$"}, TEXT | {"pattern": r"^a\d$"}, ""),
        (
            {"patternProperties": {"(?=a)": TEXT, "b": TEXT}},
            {"patternProperties": {"b": TEXT}},
            "s.pattern",
        ),
        (
            {"oneOf": [TEXT, {"type": "string", "maxLength": 2}]},
            {"anyOf": [TEXT, {"type": "string", "maxLength": 2}]},
            "s.oneOf",
        ),
        ({"oneOf": [TEXT], "anyOf": [SHORT]}, {"oneOf": [TEXT], "anyOf": [SHORT]}, ""),
        ({"anyOf": [SHORT], "oneOf": [TEXT]}, {"oneOf": [TEXT], "anyOf": [SHORT]}, ""),
        ({"enum": [{"not": 1, "format": "x"}]}, {"enum": [{"not": 1, "format": "x"}]}, ""),
        (
            {"properties": {"not": TEXT, "format": TEXT}},
            {"properties": {"not": TEXT, "format": TEXT}},
            "",
        ),
        (
            {"$defs": {"a": {"items": {"format": "x", "type": "string"}}}, "allOf": [{"not": {}}]},
            {"$defs": {"a": {"items": TEXT}}, "allOf": [{}]},
            "s.format, s.not",
        ),
        ({"items": [{"if": {}, "then": {}, "type": "string"}]}, {"items": [TEXT]}, "s.if, s.then"),
        (
            {"additionalProperties": False, "items": True},
            {"additionalProperties": False, "items": True},
            "",
        ),
        ({"not": {"format": "x"}}, {}, "s.not"),
    ],
)
def test_what_is_left_of_a_schema(schema: Any, left: Any, names: str) -> None:
    assert dropped(schema) == (left, names)


UNIQUE = {"type": "array", "items": TEXT, "uniqueItems": True}
OBJECT = {"type": "object", "properties": {"a": UNIQUE}, "required": ["a"]}


def form(*, strict: bool | None) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT, "strict": strict}}


def tool(*, strict: bool | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": OBJECT, "strict": strict}}


PLACE = "response_format.json_schema.schema"


@pytest.mark.concurrency
@pytest.mark.parametrize(
    ("fields", "status", "names"),
    [
        ({"response_format": form(strict=None)}, 200, f"{PLACE}.uniqueItems"),
        ({"response_format": form(strict=False)}, 200, f"{PLACE}.uniqueItems"),
        ({"response_format": form(strict=True)}, 422, PLACE),
        ({"tools": [tool(strict=None)]}, 200, ""),  # nothing holds the calls to it
        ({"tools": [tool(strict=None)], "tool_choice": "none", "n": 2}, 200, ""),
        (
            {"tools": [tool(strict=None)], "tool_choice": "required", "stream": True},
            200,
            "tools.function.parameters.uniqueItems",
        ),
        ({"tools": [tool(strict=True)]}, 422, "tools[0].function.parameters"),
    ],
)
def test_a_request_is_told(
    live: Live, engine: FakeEngine, fields: dict[str, Any], status: int, names: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]} | fields
    response = web.post(live.url + "/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    if status == 422:
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (names, "unsupported")
        assert "'uniqueItems'" in error["message"]
        return
    assert response.headers.get(IGNORED_HEADER, "") == names
    grammar = engine.requests[-1].params.grammar
    assert grammar is None or "uniqueItems" not in grammar.text
    prompt = engine.tokenizer.decode(engine.requests[-1].prompt_ids)
    is_shown = "tools" in fields and fields.get("tool_choice") != "none"
    assert ("uniqueItems" in prompt) == is_shown  # the model sees it all the same
