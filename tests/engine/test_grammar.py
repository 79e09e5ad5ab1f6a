"""Oracle: json, a JSON Schema validator and `re` accept every answer that ends by itself."""

from __future__ import annotations

import builtins
import json
import random
import re
from typing import Any

import pytest
import torch
from sampling_steps import adjusted, put, verified

from rorqual.engine.grammar import Grammar, GrammarCompiler, GrammarKind
from rorqual.engine.params import SamplingParams
from rorqual.engine.sampling_state import SamplingState
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END, TOOL_CALL_BEGIN, TOOL_SEP

pytest.importorskip("llguidance")

NUM_SEEDS = 200
ROOM_TOKENS = 20  # then the logits pull towards the end
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "kind": {"enum": ["whale", "sea", "größe", 7, None]},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}
CHOICES = ["whale", "whales", 'a "quoted"\nline', "größe", "</think>"]
REGEX = r"(the|a) [a-z]{2,9}( sings?)?, [0-9]{1,3}(\.[0-9]+)?é?"
LARK = r"""
start: sum
sum: term ("+" term)*
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
GRAMMARS: dict[GrammarKind, str] = {
    "json_object": "",
    "json_schema": json.dumps(SCHEMA),
    "regex": REGEX,
    "choice": json.dumps(CHOICES),
    "grammar": LARK,
}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def check(kind: GrammarKind, text: str) -> None:
    if kind == "json_object":
        assert isinstance(json.loads(text), dict)
    elif kind == "json_schema":
        value = json.loads(text)
        assert {"name", "sizes", "kind"} <= set(value)
        validators = pytest.importorskip("jsonschema_rs")
        validators.validator_for(SCHEMA).validate(value)
    elif kind == "regex":
        assert re.fullmatch(REGEX, text)
    elif kind == "choice":
        assert text in CHOICES
    else:
        assert re.fullmatch(r"[0-9+()]+", text)
        compile(re.sub(r"0+(\d)", r"\1", text), "sum", "eval")  # Python knows no leading zeros


def answer(
    grammar: Grammar, seed: int, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> list[int]:
    """Ids from random logits and random drafts, of which a half are what will be sampled."""
    params = SamplingParams(
        temperature=(0.0, 1.0)[seed % 2],
        seed=seed,
        grammar=grammar,
        top_p=(None, 0.9)[seed % 3 > 1],
    )
    state = SamplingState(params, [0], tokenizer, compiler)
    noise, guess = torch.Generator().manual_seed(seed), random.Random(seed)
    pull = torch.zeros(tokenizer.vocab_size)
    for bonus, text in ((60, "]"), (70, "}"), (80, ")"), (90, '"')):
        pull[tokenizer.encode(text)] = bonus
    pull[tokenizer.eos_id] = 100
    ids: list[int] = []
    while not ids or ids[-1] != tokenizer.eos_id:
        assert len(ids) < 10 * ROOM_TOKENS, "the answer does not end"
        logits = 3 * torch.randn(4, tokenizer.vocab_size, generator=noise)
        logits[:, tokenizer.eos_id] = 3.0
        logits += pull * (len(ids) > ROOM_TOKENS)
        drafts = [guess.randrange(tokenizer.vocab_size) for _ in range(3)]
        if guess.random() < 0.7:  # the likeliest that the grammar allows: these get accepted
            drafts[0] = int(adjusted(state, logits[0]).argmax())
        if guess.random() < 0.5:
            drafts = state.prune(drafts)
        (result,) = verified(logits[: 1 + len(drafts)], [drafts], [state])
        ids += result.token_ids
    assert not state.is_cut_short
    return ids


@pytest.mark.parametrize("kind", GRAMMARS)
def test_answers_fit_their_grammar(
    kind: GrammarKind, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    specials = set(tokenizer.special_ids.values())
    texts = set()
    for seed in range(NUM_SEEDS):
        ids = answer(Grammar(kind, GRAMMARS[kind]), seed, tokenizer, compiler)
        assert not specials & set(ids[:-1]), "a special token is no text"
        text = tokenizer.decode(ids[:-1])
        check(kind, text)
        texts.add(text)
    assert len(texts) >= (len(CHOICES) if kind == "choice" else NUM_SEEDS // 5)


@pytest.mark.parametrize("kind", GRAMMARS)
def test_rollback_leads_back_exactly(
    kind: GrammarKind, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    grammar, guess = Grammar(kind, GRAMMARS[kind]), random.Random(0)
    matcher = compiler.compile(grammar).matcher()
    ids: list[int] = []
    for _ in range(60):
        possible = matcher.allowed().nonzero().flatten().tolist()
        possible = [token_id for token_id in possible if token_id != tokenizer.eos_id]
        if not possible or (ids and guess.random() < 0.3):
            num_back = guess.randint(1, len(ids))
            matcher.rollback(num_back)
            del ids[-num_back:]
        else:
            ids.append(guess.choice(possible))
            matcher.put(ids[-1])
        fresh = compiler.compile(grammar).matcher()
        assert fresh.num_possible(ids) == len(ids)
        for token_id in ids:
            fresh.put(token_id)
        assert torch.equal(matcher.allowed(), fresh.allowed())


def test_a_whole_text_leaves_only_the_ends(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    newline = tokenizer.encode("\n")[0]
    params = SamplingParams(grammar=Grammar("regex", "ab?"), stop_token_ids=(newline,))
    state = SamplingState(params, [0], tokenizer, compiler)
    for text, then in (("a", {*tokenizer.encode("b"), tokenizer.eos_id, newline}), ("b", None)):
        put(state, tokenizer.encode(text)[0])
        left = adjusted(state, torch.zeros(tokenizer.vocab_size))
        ids = set((left == 0).nonzero().flatten().tolist())
        assert ids == (then or {tokenizer.eos_id, newline})


def test_every_end_of_the_answer_ends_a_whole_text_and_no_other(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """A checkpoint may name more ends than one. None of them may come before the text is whole."""
    (other,), (letter,) = tokenizer.encode("q"), tokenizer.encode("x")
    params = SamplingParams(grammar=Grammar("regex", "x"), stop_token_ids=(other,))
    state = SamplingState(params, [0], tokenizer, compiler)
    logits_V = torch.zeros(tokenizer.vocab_size)
    assert (adjusted(state, logits_V) > -torch.inf).nonzero().flatten().tolist() == [letter]
    put(state, letter)
    allowed = (adjusted(state, logits_V) > -torch.inf).nonzero().flatten().tolist()
    assert allowed == sorted([tokenizer.eos_id, other])


def test_a_ban_yields_where_nothing_else_is_left(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    (letter,) = tokenizer.encode("x")
    bias = {letter: -100.0, tokenizer.eos_id: -100.0}
    params = SamplingParams(grammar=Grammar("regex", "x"), logit_bias=bias)
    state = SamplingState(params, [0], tokenizer, compiler)
    logits = torch.zeros(2, tokenizer.vocab_size)
    (result,) = verified(logits, [[letter]], [state])
    assert result.token_ids == (letter, tokenizer.eos_id)


def test_a_model_that_thinks_meets_the_grammar_afterwards(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    begin, end = tokenizer.special_ids[THINK_BEGIN], tokenizer.special_ids[THINK_END]
    free, (letter,) = tokenizer.encode("the"), tokenizer.encode("x")
    params = SamplingParams(grammar=Grammar("regex", "xy"), temperature=0)
    state = SamplingState(params, [0, begin], tokenizer, compiler)
    thoughts = [*free, tokenizer.eos_id, end]
    logits = torch.zeros(len(thoughts), tokenizer.vocab_size)
    for row, token_id in enumerate(thoughts):
        logits[row, token_id] = 9.0
    for row in range(len(free)):
        assert verified(logits[row : row + 1], [[]], [state])[0].token_ids == (free[row],)
    # The end of the answer is put off: what the grammar asks for has not come.
    assert verified(logits[-2:-1], [[]], [state])[0].token_ids != (tokenizer.eos_id,)
    assert state.prune([*free, end, letter, letter]) == [*free, end, letter]
    assert verified(logits[-1:], [[]], [state])[0].token_ids == (end,)
    assert verified(logits[-1:], [[]], [state])[0].token_ids == (letter,)
    closed = SamplingState(params, [0, begin, end], tokenizer, compiler)
    assert verified(logits[-1:], [[]], [closed])[0].token_ids == (letter,)
    aware = Grammar("grammar", f'start: {THINK_END} "x"')
    state = SamplingState(SamplingParams(grammar=aware), [begin], tokenizer, compiler)
    assert state.prune([end, letter, letter]) == [end, letter]


def test_a_grammar_may_ask_for_special_tokens_by_name(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    text = f'start: {TOOL_CALL_BEGIN} "f" {TOOL_SEP} %json {{"type": "object", "properties": {{}}}}'
    matcher = compiler.compile(Grammar("grammar", text)).matcher()
    ids = [tokenizer.special_ids[TOOL_CALL_BEGIN], *tokenizer.encode("f")]
    ids += [tokenizer.special_ids[TOOL_SEP], *tokenizer.encode("{}")]
    assert matcher.num_possible(ids) == len(ids)
    assert matcher.num_possible(tokenizer.encode(TOOL_CALL_BEGIN)) == 0, "its name is no token"


MALFORMED: list[tuple[GrammarKind, str, str]] = [
    ("json_schema", "{", "not JSON"),
    ("json_schema", '{"type": "objet"}', "objet"),
    ("json_schema", '{"type": "string", "format": "zork"}', "zork"),
    ("json_schema", '{"type": "object", "not": {}}', "not"),
    ("json_schema", '{"$ref": "http://localhost/x"}', "localhost"),
    ("json_schema", '{"enum": []}', "Unsatisfiable"),
    ("json_schema", '{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "oneOf"),
    ("json_schema", '{"items": ' * 99 + "{}" + "}" * 99, "100 brackets"),
    ("json_schema", json.dumps({"enum": ["x" * 300_000]}), "characters"),
    ("json_schema", json.dumps({"allOf": [{"$ref": "#"}] * 600}), "600 times"),
    ("json_schema", json.dumps({"patternProperties": {f"{i}": {} for i in range(40)}}), "40"),
    ("json_schema", '{"type": "integer", "multipleOf": 1000003}', "1000003"),
    (
        "json_schema",
        json.dumps(
            {"items": {"properties": {f"p{i}": {} for i in range(410)}, "required": ["p1"]}}
        ),
        "409 properties of an object that may be left out",
    ),
    ("regex", "a(", "unclosed group"),
    ("regex", "(?=a)b", "look-ahead"),
    ("regex", "(" * 100 + ")" * 100, "100 brackets"),
    ("choice", "[]", "list of strings"),
    ("choice", '["a", ""]', "list of strings"),
    ("choice", "a|b", "not JSON"),
    ("grammar", "start: foo", "foo"),
    ("grammar", "start: a\na: a", "matches no text"),
    ("grammar", 'start: %json {"multipleOf": 1e9}', "multipleOf"),
    ("grammar", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)), "rules"),
]


@pytest.mark.parametrize(("kind", "text", "part"), MALFORMED)
def test_a_grammar_that_cannot_be_used_is_named(
    kind: GrammarKind, text: str, part: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(UsageError, match=re.escape(part)) as caught:
        compiler.compile(Grammar(kind, text))
    assert len(str(caught.value)) < 1000


def test_a_grammar_that_grows_too_complex_cuts_its_answer_short(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    grammar = Grammar("grammar", 'start: ("a"{1,400}){1,400}')
    state = SamplingState(SamplingParams(grammar=grammar, temperature=0), [0], tokenizer, compiler)
    logits = torch.zeros(1, tokenizer.vocab_size)
    logits[0, tokenizer.encode("a")] = 9.0
    ids: list[int] = []
    while tokenizer.eos_id not in ids and len(ids) < 200:
        ids += verified(logits, [[]], [state])[0].token_ids
    assert state.is_cut_short
    assert ids[-1] == tokenizer.eos_id


def test_compiled_grammars_are_kept_within_bounds(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, max_entries=2)
    made: list[Grammar] = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda g: made.append(g) or compile_one(g))
    one, two, three = (Grammar("regex", text) for text in ("a", "b", "c"))
    for grammar in (one, two, one, three, one, two):
        compiler.compile(grammar)
    assert made == [one, two, three, two]


def test_long_grammars_make_room_for_each_other(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their characters are counted as they are now: what is forgotten counts no more."""
    monkeypatch.setattr("rorqual.engine.grammar.MAX_CACHED_CHARS", 12)
    compiler = GrammarCompiler(tokenizer)
    texts = ["aaaa", "bbbb", "cccc"]  # fill it to the last character
    for text in texts:
        compiler.compile(Grammar("regex", text))
    for text in texts:
        assert compiler.known(Grammar("regex", text)) is not None
    compiler.compile(Grammar("regex", "ddddd"))  # takes the places of two
    known = [compiler.known(Grammar("regex", text)) is not None for text in [*texts, "ddddd"]]
    assert known == [False, False, True, True]
    compiler.compile(Grammar("regex", "e" * 13))  # one is always kept
    assert compiler.known(Grammar("regex", "e" * 13)) is not None
    assert compiler.known(Grammar("regex", "ddddd")) is None


def test_without_the_library_only_grammars_fail(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    compiler = GrammarCompiler(tokenizer)
    SamplingState(SamplingParams(), [0], tokenizer, compiler)
    with pytest.raises(UsageError, match=r"rorqual\[serve\]"):
        compiler.compile(Grammar("json_object"))
