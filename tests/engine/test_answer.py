"""Answers, what sampling remembers, and how large a grammar may be. Oracle: the rules, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rorqual.engine import Request, SamplingParams
from rorqual.engine.answer import Answer
from rorqual.engine.grammar import (
    MAX_DEPTH,
    MAX_MULTIPLE,
    MAX_PATTERNS,
    MAX_RULES,
    MAX_TEXT_CHARS,
    Grammar,
    GrammarKind,
    _check_schema,
    _check_size,
)
from rorqual.engine.logprobs import TokenLogprob
from rorqual.engine.sampling_state import UNIFORMS_AT_ONCE, SamplingState
from rorqual.engine.verify import Verified
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer


def verified(ids: list[int], num_accepted: int) -> Verified:
    logprobs = tuple(TokenLogprob(token_id, -0.5, ()) for token_id in ids)
    return Verified(tuple(ids), num_accepted, logprobs)


def test_a_stop_within_a_step_cuts_all_that_came_behind_it(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    params = SamplingParams(stop=("b",), logprobs=0, prompt_logprobs=0)
    answer = Answer(Request([5], params), tokenizer, 100)
    first = answer.commit(verified([a, a], 1), 3)
    assert (first.text, first.token_ids, first.usage) == ("aa", (a, a), None)
    assert first.stop is None
    assert first.prompt_logprobs == (None,)
    last = answer.commit(verified([a, b, c], 2), 2)
    assert (last.text, last.token_ids, last.finish_reason) == ("a", (a, b), "stop")
    assert last.stop == "b"
    assert [item.token_id for item in last.logprobs] == [a, b]
    assert last.prompt_logprobs is None
    assert last.usage is not None
    assert (last.usage.num_prompt_tokens, last.usage.num_output_tokens) == (1, 4)
    assert (last.usage.drafted, last.usage.accepted) == ((2, 2, 1), (2, 1, 0))
    output = answer.output()
    assert (output.text, output.token_ids) == ("aaa", [a, a, a, b])
    assert [item.token_id for item in output.logprobs] == [a, a, a, b]


def test_what_ends_an_answer_may_be_part_of_it(tokenizer: Tokenizer) -> None:
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    eos_id = tokenizer.eos_id

    def text_of(ids: list[int], **settings: Any) -> tuple[str, str]:
        """Whole, and put together from its pieces."""
        settings = {"stop": ("bc", "cd"), "skip_special_tokens": True} | settings
        params = SamplingParams(include_stop_str_in_output=True, **settings)
        answer, pieces = Answer(Request([5], params), tokenizer, 100), []
        while answer.finish_reason is None:
            pieces.append(answer.commit(verified(ids[:1], 0), 0).text)
            ids = ids[1:]
        assert answer.finish_reason == "stop"
        return answer.text, "".join(pieces)

    assert text_of([a, b, c, d]) == ("abc", "abc")
    assert text_of([a, c, d, d]) == ("acd", "acd")
    assert text_of([a, b, d, b, eos_id]) == ("abdb", "abdb")  # a stop that never came
    assert text_of([a, d, b], stop_token_ids=(d,)) == ("ad", "ad")
    assert text_of([a, b, c], stop_token_ids=(b,)) == ("ab", "ab")
    name = tokenizer.decode([eos_id])
    assert text_of([a, eos_id], skip_special_tokens=False) == ("a" + name, "a" + name)


def test_the_end_of_a_half_character_may_be_a_stop(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🐳")[0]
    params = SamplingParams(max_tokens=1, stop=("\ufffd",))
    answer = Answer(Request([5], params), tokenizer, 100)
    assert answer.put(half) == ""
    assert (answer.text, answer.finish_reason) == ("", "stop")


@pytest.mark.parametrize(("max_tokens", "max_positions", "num_left"), [(5, 10, 5), (9, 10, 7)])
def test_what_is_left_of_an_answer(
    tokenizer: Tokenizer, max_tokens: int, max_positions: int, num_left: int
) -> None:
    request = Request([5, 6, 7], SamplingParams(max_tokens=max_tokens))
    answer = Answer(request, tokenizer, max_positions)
    assert answer.num_left == num_left
    answer.put(tokenizer.encode("a")[0])
    assert answer.num_left == num_left - 1
    assert not answer.needs_prompt_logprobs


# Sampling's state


def test_random_numbers_are_the_same_however_far_ahead_they_are_looked_at(
    tokenizer: Tokenizer,
) -> None:
    def state() -> SamplingState:
        return SamplingState(SamplingParams(temperature=1, seed=4), [0], tokenizer)

    count = 2 * UNIFORMS_AT_ONCE + 3
    one_by_one, ahead, mixed = state(), state(), state()
    wanted = []
    for _ in range(count):
        wanted.append(one_by_one.uniform())
        one_by_one.commit([5])
    assert len(set(wanted)) == count
    assert [ahead.uniform(offset) for offset in range(count)] == wanted
    assert ahead.uniform() == wanted[0], "a look takes nothing"
    got = []
    while len(got) < count:
        got += [mixed.uniform(offset) for offset in range(min(5, count - len(got)))]
        for _ in range(5):
            mixed.commit([5])
    assert got == wanted
    ones = torch.Generator().manual_seed(4)
    block = torch.rand(UNIFORMS_AT_ONCE, dtype=torch.float64, generator=ones).tolist()
    assert wanted[:UNIFORMS_AT_ONCE] == block


@pytest.mark.parametrize("offset", [-1, 0])
def test_ids_that_the_tokenizer_does_not_have(tokenizer: Tokenizer, offset: int) -> None:
    """The last one is known, the next is not."""
    size = tokenizer.vocab_size
    for settings in ({"stop_token_ids": (size + offset,)}, {"logit_bias": {size + offset: 1.0}}):
        params = SamplingParams(**settings)  # type: ignore[arg-type]
        if offset:
            SamplingState(params, [0], tokenizer)
        else:
            with pytest.raises(UsageError, match=f"0 to {size - 1}"):
                SamplingState(params, [0], tokenizer)


# Grammars


def brackets(depth: int) -> str:
    return "(" * depth + ")" * depth


@pytest.mark.parametrize(
    ("kind", "text", "is_good"),
    [
        ("regex", brackets(MAX_DEPTH), True),
        ("regex", brackets(MAX_DEPTH + 1), False),
        ("regex", "()" * 500, True),  # beside each other they are not deep
        ("regex", brackets(40) * 3, True),
        ("regex", r"\(" * 500, True),  # and these are none
        ("regex", "[" * (MAX_DEPTH + 1), False),
        ("json_schema", "{[" * 32, True),
        ("json_schema", "{[" * 33, False),
        ("regex", "x" * MAX_TEXT_CHARS, True),
        ("regex", "x" * (MAX_TEXT_CHARS + 1), False),
        ("grammar", "start: a\n" + "a: b\n" * (MAX_RULES - 1), True),
        ("grammar", "start: a\n" + "a: b\n" * MAX_RULES, False),
        ("grammar", "start: a\n" + "  ?b: c\n" * MAX_RULES, False),
        ("regex", "a: b\n" * (MAX_RULES + 1), True),
    ],
)
def test_how_large_a_grammar_may_be(kind: GrammarKind, text: str, is_good: bool) -> None:
    if is_good:
        _check_size(Grammar(kind, text))
    else:
        with pytest.raises(UsageError, match="too large"):
            _check_size(Grammar(kind, text))


@pytest.mark.parametrize(
    ("one", "most"),
    [
        (lambda n: {"allOf": [{"$ref": "#"}] * n}, MAX_RULES),
        (lambda n: {"a": [{"b": {"$ref": "#"}}], "c": [{"$ref": "#"}] * (n - 1)}, MAX_RULES),
        (lambda n: {"patternProperties": {str(i): {} for i in range(n)}}, MAX_PATTERNS),
        (
            lambda n: [
                {"patternProperties": {str(i): {} for i in range(n - 2)}},
                {"patternProperties": {"a": {}, "b": {}}},
            ],
            MAX_PATTERNS,
        ),
        (lambda n: {"a": {"multipleOf": n}}, MAX_MULTIPLE),
        (lambda n: [{"multipleOf": 1}, {"multipleOf": float(n)}], MAX_MULTIPLE),
    ],
)
def test_how_large_a_schema_may_be(one: Any, most: int) -> None:
    _check_schema(one(most))
    with pytest.raises(UsageError, match=f"at most {most}"):
        _check_schema(one(most + 1))
