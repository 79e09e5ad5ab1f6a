"""An answer's least length. Oracle: the rule by hand, and plain decoding without an end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling_steps import verified

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.answer import Answer
from rorqual.engine.grammar import Grammar, GrammarCompiler
from rorqual.engine.sampling_state import SamplingState
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

EOS_ID, STOP_ID = 5, 4
SMALL: Any = SimpleNamespace(vocab_size=6, eos_id=EOS_ID, special_ids={})
ENDING = torch.tensor([[0.0, 1.0, 3.0, 2.0, 8.0, 9.0]])
"""Logits of a model that wants to end at once, by either end."""


def answer_ids(drafts: list[int], num_steps: int, **settings: Any) -> list[int]:
    """What comes until an end, with these drafts in each step."""
    params = SamplingParams(temperature=0, stop_token_ids=(STOP_ID,), **settings)
    state, ids = SamplingState(params, [0], SMALL), []
    for _ in range(num_steps):
        (result,) = verified(ENDING.expand(1 + len(drafts), 6), [drafts], [state])
        ids += result.token_ids
        if ids[-1] in state.end_ids:
            break
    return ids


@pytest.mark.parametrize("drafts", [[], [2], [2, 2, 2], [EOS_ID], [2, EOS_ID, 2]])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
def test_no_end_comes_before_whatever_is_drafted(drafts: list[int], min_tokens: int) -> None:
    ids = answer_ids(drafts, 20, min_tokens=min_tokens)
    assert ids == [2] * min_tokens + [EOS_ID]


def test_a_ban_and_no_end_at_all_go_with_it() -> None:
    assert answer_ids([], 4, min_tokens=2, logit_bias={2: -100}) == [3, 3, EOS_ID]
    assert answer_ids([], 4, min_tokens=2, ignore_eos=True) == [EOS_ID] * 4


def test_a_seed_draws_the_same_with_and_without_drafts() -> None:
    for seed in range(20):
        texts = []
        for drafts in ([], [2, 3, 2]):
            params = SamplingParams(temperature=3.0, seed=seed, min_tokens=6)
            state, ids = SamplingState(params, [0], SMALL), []
            while not ids or (ids[-1] not in state.end_ids and len(ids) < 40):
                (result,) = verified(ENDING.expand(1 + len(drafts), 6), [drafts], [state])
                ids += result.token_ids
            texts.append(ids[:40])
        assert texts[0] == texts[1]
        assert EOS_ID not in texts[0][:6]


@pytest.mark.parametrize(
    ("min_tokens", "shown", "num_tokens"),
    [(0, "a", 2), (1, "a", 2), (2, "aba", 4), (3, "aba", 4), (4, "ababa", 6)],
)
def test_a_stop_string_that_begins_before_is_text(
    tokenizer: Tokenizer, min_tokens: int, shown: str, num_tokens: int
) -> None:
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    answer = Answer(Request([5], SamplingParams(stop=("b",), min_tokens=min_tokens)), tokenizer, 99)
    while answer.finish_reason is None:
        answer.put(a if len(answer.token_ids) % 2 == 0 else b)
    assert (answer.text, len(answer.token_ids)) == (shown, num_tokens)


def test_a_grammar_that_must_end_ends(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, min_tokens=9, grammar=Grammar("choice", '["a"]'))
    state = SamplingState(params, [5], tokenizer, GrammarCompiler(tokenizer))
    ids = []
    for _ in range(3):
        (result,) = verified(torch.zeros(1, tokenizer.vocab_size), [[]], [state])
        ids += result.token_ids
        if ids[-1] in state.end_ids:
            break
    assert ids == [tokenizer.encode("a")[0], tokenizer.eos_id]


def test_a_grammar_that_may_end_goes_on(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, min_tokens=4, grammar=Grammar("regex", "a+"))
    state = SamplingState(params, [5], tokenizer, GrammarCompiler(tokenizer))
    logits = torch.zeros(1, tokenizer.vocab_size)
    logits[0, tokenizer.eos_id] = 9.0
    ids: list[int] = []
    while not ids or ids[-1] not in state.end_ids:
        ids += verified(logits, [[]], [state])[0].token_ids
    assert len(ids) == 5
    assert set(tokenizer.decode(ids[:-1])) == {"a"}


def test_a_real_engine(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """Where the likeliest token is the end, it comes just after the least length."""
    bias = {tokenizer.eos_id: 100.0}
    for speculate in (0, 1):
        engine = Engine(model, tokenizer, speculate=speculate)
        params = SamplingParams(temperature=0, min_tokens=7, max_tokens=20, logit_bias=bias)
        for output in engine.generate([[3, 4], [9]], params):
            assert len(output.token_ids) == 8
            assert output.token_ids[-1] == tokenizer.eos_id
            assert output.finish_reason == "stop"


@pytest.mark.parametrize("value", [-1, 11, 2.0, True, None])
def test_a_least_length_that_cannot_be(value: Any) -> None:
    with pytest.raises(UsageError, match="min_tokens"):
        SamplingParams(min_tokens=value, max_tokens=10)


@pytest.mark.parametrize("is_skipped", [True, False])
def test_names_of_ends_and_fillings_may_be_left_out(tokenizer: Tokenizer, is_skipped: bool) -> None:
    names = ["<｜end▁of▁sentence｜>", "<think>", "<｜begin▁of▁sentence｜>", "<｜User｜>"]
    ids = [*(tokenizer.special_ids[name] for name in names), *tokenizer.encode("a")]
    params = SamplingParams(ignore_eos=True, max_tokens=5, skip_special_tokens=is_skipped)
    answer = Answer(Request([5], params), tokenizer, 99)
    for token_id in ids:
        answer.put(token_id)
    shown = [name for name in names if not (is_skipped and "sentence" in name)]
    assert answer.text == "".join(shown) + "a"
