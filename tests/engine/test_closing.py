"""Answers end in their grammar before their tokens do; reasoning has a limit.

The model is a table of random logits by token and place, so no answer ends by itself. Oracle: json
and a validator of JSON schemas on every answer, and plain decoding for drafts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sampling_steps import verified
from torch import Tensor

from rorqual.engine.grammar import Grammar, GrammarCompiler
from rorqual.engine.params import SamplingParams
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.shortest import Letters, Place, shortest_end
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END, TOOL_CALL_BEGIN, TOOL_CALL_END

pytest.importorskip("llguidance")

SPREAD = 5.0
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {"name": TEXT, "size": WHOLE, "kind": {"enum": ["whale", "sea"]}},
        "required": ["name", "size", "kind"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "array", "items": TEXT}},
            "b": {"type": "object", "properties": {"c": WHOLE}, "required": ["c"]},
            "large": {
                "type": "object",
                "properties": {f"name_{i}": TEXT for i in range(12)},
                "required": [f"name_{i}" for i in range(12)],
            },
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    "any": {"type": "object"},
    "list": {"type": "array", "items": WHOLE, "minItems": 3},
    "text": TEXT,
    "number": {"type": "number"},
}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def logits_at(token_ids: Sequence[int], seed: int, vocab_size: int) -> Tensor:
    """Of the token after these."""
    last = token_ids[-1] if token_ids else 0
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * len(token_ids) + last)
    return torch.randn(vocab_size, generator=generator) * SPREAD


@dataclass
class Written:
    token_ids: list[int]
    text: str
    has_ended: bool


def write(
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    *,
    prompt: str = "Well?",
    drafts: int = 0,
    max_positions: int | None = None,
    **settings: Any,
) -> Written:
    """An answer of the random model. `drafts` of each step are right or wrong by chance."""
    params = SamplingParams(**{"temperature": 1.0, "seed": 1, "max_tokens": 40} | settings)
    prompt_ids = tokenizer.encode(prompt, allow_special=True)
    limit = min(params.max_tokens, max_positions or params.max_tokens)
    state = SamplingState(params, prompt_ids, tokenizer, compiler, max_tokens=limit)
    chance = random.Random(params.seed)
    seed, size = params.seed or 0, tokenizer.vocab_size
    ids: list[int] = []
    while len(ids) < limit and not (ids and ids[-1] in state.end_ids):
        most = min(drafts, limit - len(ids) - 1)
        guesses = [chance.choice([34, 125, chance.randrange(size)]) for _ in range(most)]
        rows = [logits_at(ids + guesses[:k], seed, size) for k in range(most + 1)]
        (result,) = verified(torch.stack(rows), [guesses], [state])
        ids += result.token_ids
    has_ended = ids[-1] in state.end_ids
    return Written(ids, tokenizer.decode(ids[:-1] if has_ended else ids), has_ended)


def least(tokenizer: Tokenizer, compiler: GrammarCompiler, grammar: Grammar) -> int:
    """Tokens of the shortest answer, its end included."""
    end = shortest_end(compiler.compile(grammar).matcher().state, Letters(tokenizer), Place())
    assert end is not None
    return len(end) + 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_whole_however_few_tokens_it_has(
    tokenizer: Tokenizer, compiler: GrammarCompiler, name: str
) -> None:
    validators = pytest.importorskip("jsonschema_rs")
    grammar = Grammar("json_schema", json.dumps(SCHEMAS[name]))
    fewest = least(tokenizer, compiler, grammar)
    for extra in (0, 1, 2, 3, 5, 13, 40):
        for seed in range(3):
            settings: dict[str, Any] = {"temperature": 1.0 if seed else 0.0, "seed": seed}
            settings |= {"max_tokens": fewest + extra, "grammar": grammar}
            written = write(tokenizer, compiler, **settings)
            assert written.has_ended
            value = json.loads(written.text, parse_float=lambda text: 0.5)  # 1e999 is a number
            assert validators.is_valid(SCHEMAS[name], value), written.text
    short = write(tokenizer, compiler, grammar=grammar, max_tokens=fewest - 1)
    assert not short.has_ended
    assert len(short.token_ids) == fewest - 1


def test_far_from_the_end_hardly_anything_is_looked_at(
    tokenizer: Tokenizer, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rorqual.engine import closing

    looks: list[int] = []

    def counted(*args: Any) -> Any:
        looks.append(1)
        return shortest_end(*args)

    monkeypatch.setattr(closing, "shortest_end", counted)
    grammar = Grammar("json_schema", json.dumps({"type": "array", "items": WHOLE}))
    closers = {i: -100.0 for i in range(tokenizer.vocab_size) if b"]" in tokenizer.bytes_of(i)}
    written = write(tokenizer, compiler, grammar=grammar, max_tokens=700, logit_bias=closers)
    assert written.has_ended
    assert len(written.token_ids) == 700
    assert len(looks) < 400  # at most once for each of the last 256, and a few before


@pytest.mark.parametrize("name", ["flat", "nested", "any"])
@pytest.mark.parametrize("drafts", [1, 2])
def test_drafts_change_nothing(
    tokenizer: Tokenizer, compiler: GrammarCompiler, name: str, drafts: int
) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMAS[name]))
    for seed in range(3):
        settings: dict[str, Any] = {"grammar": grammar, "seed": seed, "max_tokens": 35}
        plain = write(tokenizer, compiler, **settings)
        assert write(tokenizer, compiler, drafts=drafts, **settings) == plain
        assert plain.has_ended


def test_what_the_context_leaves_counts_as_the_limit(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMAS["flat"]))
    written = write(tokenizer, compiler, grammar=grammar, max_tokens=4096, max_positions=50)
    assert written.has_ended
    json.loads(written.text)


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {34: 50.0}},
        {"top_k": 2},
        {"top_p": 0.1},
        {"min_p": 0.9},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"temperature": 0.0, "frequency_penalty": -2.0},
    ],
    ids=str,
)
def test_settings_do_not_keep_an_answer_open(
    tokenizer: Tokenizer, compiler: GrammarCompiler, settings: dict[str, Any]
) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMAS["flat"]))
    for seed in range(3):
        written = write(
            tokenizer, compiler, grammar=grammar, **{"seed": seed, "max_tokens": 40} | settings
        )
        assert written.has_ended
        json.loads(written.text)


def test_a_banned_bracket_is_closed_all_the_same(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """A ban holds unless nothing else is left, and at the end nothing is."""
    banned = {i: -100.0 for i in range(tokenizer.vocab_size) if b"}" in tokenizer.bytes_of(i)}
    written = write(tokenizer, compiler, grammar=Grammar("json_object"), logit_bias=banned)
    assert written.has_ended
    json.loads(written.text)


def test_an_answer_that_a_call_ends_needs_no_further_tokens(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """`parallel_tool_calls: false` stops at the first call's end token."""
    text = f"start: call+\ncall: {TOOL_CALL_BEGIN} %json {{}} {TOOL_CALL_END}"
    grammar = Grammar("grammar", text)
    end_id = tokenizer.special_ids[TOOL_CALL_END]
    written = write(tokenizer, compiler, grammar=grammar, max_tokens=3, stop_token_ids=(end_id,))
    assert written.has_ended
    assert written.token_ids[-1] == end_id
    assert len(written.token_ids) == 3


def test_a_token_refused_is_drawn_anew_and_not_for_ever(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """Every opening bracket but the last is too much; the ninth choice is the end's own."""
    grammar = Grammar("grammar", 'start: list\nlist: "[" list? "]"')
    bracket = tokenizer.encode("[")[0]
    written = write(
        tokenizer, compiler, grammar=grammar, max_tokens=20, logit_bias={bracket: 100.0}
    )
    assert written.has_ended
    assert written.text == "[" * 9 + "]" * 9


OPEN = f"Well?{THINK_BEGIN}"


@pytest.mark.parametrize("limit", [0, 1, 7])
@pytest.mark.parametrize("drafts", [0, 2])
def test_reasoning_ends_at_its_limit(
    tokenizer: Tokenizer, compiler: GrammarCompiler, limit: int, drafts: int
) -> None:
    end_id = tokenizer.special_ids[THINK_END]
    silent = {tokenizer.eos_id: -100.0, end_id: -50.0}
    settings: dict[str, Any] = {"max_thinking_tokens": limit, "logit_bias": silent, "seed": 2}
    written = write(tokenizer, compiler, prompt=OPEN, drafts=drafts, **settings)
    assert written.token_ids.index(end_id) == limit
    free = write(tokenizer, compiler, prompt=OPEN, logit_bias=silent, seed=2)
    assert free.token_ids[:limit] == written.token_ids[:limit]
    assert end_id not in free.token_ids
    # What the answer opens by itself counts too.
    begin_id = tokenizer.special_ids[THINK_BEGIN]
    opened = write(tokenizer, compiler, drafts=drafts, **settings | {
        "logit_bias": silent | {begin_id: 100.0}, "repetition_penalty": 100.0})  # fmt: skip
    assert opened.token_ids.index(end_id) <= opened.token_ids.index(begin_id) + 1 + limit


def test_a_limit_of_reasoning_changes_nothing_else(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    plain = write(tokenizer, compiler)
    assert write(tokenizer, compiler, max_thinking_tokens=3) == plain


@pytest.mark.parametrize("limit", [None, 5])
def test_reasoning_leaves_room_for_the_grammar(
    tokenizer: Tokenizer, compiler: GrammarCompiler, limit: int | None
) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMAS["flat"]))
    fewest = least(tokenizer, compiler, grammar)
    end_id = tokenizer.special_ids[THINK_END]
    for extra in (1, 2, 6, 30):
        written = write(
            tokenizer,
            compiler,
            prompt=OPEN,
            grammar=grammar,
            max_tokens=fewest + extra,
            max_thinking_tokens=limit,
            logit_bias={end_id: -50.0},
        )
        assert written.has_ended
        place = written.token_ids.index(end_id)
        assert place == min(extra - 1, extra if limit is None else limit)
        json.loads(written.text.split(THINK_END)[1])


def test_a_grammar_that_speaks_of_reasoning_is_held_to_the_limit(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    text = f"start: {THINK_BEGIN} TEXT? {THINK_END} %json {{}}\nTEXT: /(.|\\n)+/"
    for seed in range(4):
        written = write(
            tokenizer, compiler, grammar=Grammar("grammar", text), max_thinking_tokens=4, seed=seed
        )
        assert written.has_ended
        # A character that is begun is ended first.
        assert written.token_ids.index(tokenizer.special_ids[THINK_END]) <= 1 + 4 + 3
