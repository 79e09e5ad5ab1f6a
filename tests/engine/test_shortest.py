"""The shortest end of a text. Oracle: ends by hand, in bytes, and a validator of JSON schemas."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from rorqual.engine.grammar import Grammar, GrammarCompiler, GrammarKind
from rorqual.engine.shortest import MAX_MADE, NUM_WIDE, Effort, Letters, Place, shortest_end
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import TOOL_CALL_BEGIN, TOOL_CALL_END

pytest.importorskip("llguidance")

TEXT, WHOLE, NUMBER, FLAG = ({"type": t} for t in ("string", "integer", "number", "boolean"))


def many(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def thing(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


PAIR = thing({"x": NUMBER, "y": TEXT})
KIND = {"enum": ["crimson", "red", "green"]}
WHALE = thing({"alpha": TEXT, "beta": WHOLE, "opt": many(PAIR), "kind": KIND}, ["alpha", "kind"])
LARGE = {f"key_{index}": thing({"a": TEXT, "b": PAIR}) for index in range(25)}
TREE = {"$defs": {"n": thing({"v": WHOLE, "k": many({"$ref": "#/$defs/n"})})}, "$ref": "#/$defs/n"}
FORCED = '"' + "".join(f',"f{index}":""' for index in range(2, 30)) + "}"
CASES: list[tuple[Any, str, str]] = [
    (WHALE, "", '{"alpha":"","kind":"red"}'),
    (WHALE, '{"alpha":"abc', '","kind":"red"}'),
    (WHALE, '{"alpha":"ab\\', '"","kind":"red"}'),
    (WHALE, '{"alpha":"ab\\\\', '","kind":"red"}'),
    (thing({'a"c': WHOLE, "ad": WHOLE, 'a"b': WHOLE}, ['a"b']), "", '{"a\\"b":0}'),
    (thing({"a\\c": WHOLE, "ad": WHOLE, "a\\b": WHOLE}, ["a\\b"]), '{"a', '\\\\b":0}'),
    (WHALE, '{"alpha":"ab\\u00', '00","kind":"red"}'),
    (WHALE, '{"alpha":"","b', 'eta":0,"kind":"red"}'),
    (WHALE, '{"alpha":"","beta":-', '0,"kind":"red"}'),
    (WHALE, '{"alpha":"","beta":12', ',"kind":"red"}'),
    (WHALE, '{"alpha":"","opt":[{"x":1.', '0,"y":""}],"kind":"red"}'),
    (WHALE, '{"alpha":"","opt":[{"x":1.5e', '0,"y":""}],"kind":"red"}'),
    (WHALE, '{"alpha":"","kind":"g', 'reen"}'),
    (WHALE, '{"alpha":"","kind":"red"', "}"),
    (WHALE, '{"alpha":"","kind":"red"}', ""),
    (WHALE, '{"alpha":"{[\\"', '","kind":"red"}'),
    (thing(LARGE | {"zz": FLAG}, ["zz"]), "", '{"zz":true}'),
    (thing(LARGE | {"zz": FLAG}, ["zz"]), '{"key_3":{"a":""', ',"b":{"x":0,"y":""}},"zz":true}'),
    (thing({f"f{i}": TEXT for i in range(30)}), '{"f0":"","f1":"', FORCED),
    (thing({"s": TEXT | {"minLength": 9}}), '{"s":"ab', 'aaaaaaa"}'),
    (thing({"s": TEXT, "n": WHOLE | {"minimum": 137, "maximum": 141}}), '{"s":"', '","n":137}'),
    (many(WHOLE, minItems=4), "[7", ",0,0,0]"),
    (many(many(TEXT)), '[["a"],["b', '"]]'),
    ({"anyOf": [thing({"long": TEXT, "b": TEXT}), thing({"c": WHOLE}), WHOLE]}, "", "0"),
    ({"anyOf": [thing({"long": TEXT, "b": TEXT}), thing({"c": WHOLE})]}, "", '{"c":0}'),
    (thing({"v": {"type": ["null", "string", "integer"]}}), '{"v":', "0}"),
    (thing({"v": {"enum": ["red", None, "green"]}}), "", '{"v":null}'),
    (thing({"v": {"const": "hello world"}}), '{"v":"h', 'ello world"}'),
    (TREE, '{"v":1,"k":[{"v":2,"k":[{"v', '":0,"k":[]}]}]}'),
    ({"type": "object"}, "", "{}"),
    ({"type": "object"}, '{"a":[[[{"b":tr', "ue}]]]}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def end_of(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, text: str) -> str:
    compiled = compiler.compile(grammar)
    matcher, letters = compiled.matcher(), Letters(tokenizer)
    place = Place()
    for byte in text.encode():
        matcher.put(letters.ids[byte])
        place = letters.place_after(place, letters.ids[byte])
    assert matcher.failure is None
    end = shortest_end(matcher.state, letters, place, compiled.names)
    assert end is not None
    for token_id in end:
        matcher.put(token_id)
    assert matcher.allowed()[tokenizer.eos_id]
    return tokenizer.decode(end)


@pytest.mark.parametrize(("schema", "text", "end"), CASES)
def test_the_shortest_end_of_json(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str, end: str
) -> None:
    validators = pytest.importorskip("jsonschema_rs")
    found = end_of(compiler, tokenizer, Grammar("json_schema", json.dumps(schema)), text)
    assert found == end
    assert validators.is_valid(schema, json.loads(text + found))


@pytest.mark.parametrize(
    ("schema", "least"),
    [
        (thing({"d": TEXT | {"pattern": "^[A-F]{3}-[0-9]{8}x?$"}}), 20),
        (thing({"t": TEXT | {"format": "date-time"}}), 28),
        (thing({"u": TEXT | {"format": "uuid"}}), 44),
        (thing({"n": WHOLE | {"multipleOf": 7, "minimum": 1000}}), 10),
    ],
)
def test_what_has_many_equal_ends_is_found_too(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, least: int
) -> None:
    """Every digit is as good as another: without that the search would try 10^8 of them."""
    text = end_of(compiler, tokenizer, Grammar("json_schema", json.dumps(schema)), "")
    assert len(text) == least
    json.loads(text)


@pytest.mark.parametrize(
    ("kind", "grammar", "text", "end"),
    [
        ("choice", '["whales sing", "whale", "sea"]', "", "sea"),
        ("choice", '["whales sing", "whale", "sea"]', "wh", "ale"),
        ("choice", '["whales sing", "whale", "sea"]', "whales", " sing"),
        ("regex", r"[a-z]{4}@[a-z]+\.(info|org)", "ab", "aa@a.org"),
        ("json_object", "", '{"größe":"ñ', '"}'),
        ("grammar", 'start: "a" | "(" start ")"', "((", "a))"),
        ("grammar", 'start: /(.|\\n)*/', "any text", ""),
    ],
)  # fmt: skip
def test_other_grammars(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    kind: GrammarKind,
    grammar: str,
    text: str,
    end: str,
) -> None:
    assert end_of(compiler, tokenizer, Grammar(kind, grammar), text) == end


def test_special_tokens_are_steps(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text = f'start: TEXT? {TOOL_CALL_BEGIN} "go" {TOOL_CALL_END}\nTEXT: /(.|\\n)+/'
    end = end_of(compiler, tokenizer, Grammar("grammar", text), "Let me")
    assert end == f"{TOOL_CALL_BEGIN}go{TOOL_CALL_END}"


def test_the_rest_of_a_character_comes_first(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher, letters = compiler.compile(Grammar("json_object")).matcher(), Letters(tokenizer)
    place = Place()
    for byte in b'{"a":"' + "鯨".encode()[:2]:
        matcher.put(letters.ids[byte])
        place = letters.place_after(place, letters.ids[byte])
    end = shortest_end(matcher.state, letters, place)
    assert end is not None
    assert matcher.num_possible(end) == len(end)


@pytest.mark.parametrize("text", ["", "a", '"', "\\", '\\"', '"\\', "\\\\", '[{"\\": "}]'])
def test_a_text_ends_where_json_says(text: str) -> None:
    """With whatever is escaped in it, as a name and as a value."""
    written = json.dumps(text).encode()
    inside = Place().after(b"{" + written[:-1])
    assert (inside.is_text, inside.is_name, inside.word) == (True, True, written[1:-1])
    value = inside.after(b'":' + written)
    assert (value.is_text, value.is_name, value.has_value) == (False, False, True)
    assert value.after(b"}") == Place(word=b"}")


def test_it_gives_up_in_bounded_time(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """This end is 3,000 bytes away."""
    grammar = Grammar("regex", r"([ab]c){1500}d")
    assert (
        shortest_end(compiler.compile(grammar).matcher().state, Letters(tokenizer), Place()) is None
    )


def test_an_answer_has_an_end_of_its_effort(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """Each state of this expression leads to 26 others, and thirty answers may look at once."""
    text = r"x([a-z]*a[a-z]{11}b|[a-z]*c[a-z]{11}d){3}"
    matcher = compiler.compile(Grammar("regex", text)).matcher().state
    letters, effort = Letters(tokenizer), Effort(3 * MAX_MADE)
    left = [effort.num_left]
    for _ in range(9):
        assert shortest_end(matcher, letters, Place(), (), effort) is None
        left.append(effort.num_left)
    assert all(a - b <= MAX_MADE + NUM_WIDE for a, b in pairwise(left))
    assert left[-1] > -NUM_WIDE
    assert left[-1] == left[-2] <= 0
