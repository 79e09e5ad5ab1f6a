"""Sampling and the ends of answers at their very edges.

Oracles: transformers' logits processors where they define the setting (a filter keeps what they
keep), closed forms elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling_steps import adjusted, probabilities
from small_models import ALWAYS, memory_of
from torch import Tensor

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.answer import Answer, StopFilter
from rorqual.engine.logit_changes import LogitChanges, change
from rorqual.engine.logprobs import token_logprobs
from rorqual.engine.params import MAX_SEED
from rorqual.engine.sampling_state import SamplingState
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

BLOCK_TOKENS = 16
# Powers of two and their logarithms' exponentials are exact in float32 here: 0.5 is 0.5.
HALVES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])


def hot(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **settings})


def kept(logits_V: Tensor, **settings: Any) -> list[int]:
    return probabilities(logits_V, hot(**settings)).nonzero().flatten().tolist()


def kept_by_transformers(warper: Any, logits_V: Tensor) -> list[int]:
    left_1V = warper(torch.zeros(1, 1, dtype=torch.long), logits_V[None].clone())
    return (left_1V[0] > -torch.inf).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_p", "ids"),
    [
        (0.4999, [1]),
        (0.5, [1]),  # reached exactly: the next one goes
        (0.5001, [1, 3]),
        (0.75, [1, 3]),
        (0.875, [0, 1, 3]),
        (0.8751, [0, 1, 2, 3]),
    ],
)
def test_top_p_that_is_reached_exactly_keeps_no_more(top_p: float, ids: list[int]) -> None:
    """The fewest tokens whose probabilities reach top_p: at the edge as transformers' (and the
    paper's, arXiv 1904.09751), which removes what lies within 1 - top_p of the tail.
    """
    from transformers import TopPLogitsWarper

    logits_V = HALVES.log()
    assert kept(logits_V, top_p=top_p) == ids
    # Of equally likely tokens transformers keeps the higher ids, we the lower: compare counts.
    assert len(kept_by_transformers(TopPLogitsWarper(top_p), logits_V)) == len(ids)


def test_top_k_ties_keep_k() -> None:
    """The lower ids of equal ones; transformers keeps all of them, beyond k."""
    logits_V = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    assert kept(logits_V, top_k=2) == [0, 1]
    assert kept(logits_V, top_k=3) == [0, 1, 2]
    assert kept(logits_V, top_k=5) == kept(logits_V, top_k=99) == [0, 1, 2, 3, 4]


def test_min_p_keeps_what_has_just_enough() -> None:
    from transformers import MinPLogitsWarper

    logits_V = HALVES.log()
    for min_p, ids in (
        (0.5, [1, 3]),
        (0.5001, [1]),
        (0.25, [0, 1, 3]),
        (1.0, [1]),
        (0.0, [*range(5)]),
    ):
        assert kept(logits_V, min_p=min_p) == ids
        assert kept_by_transformers(MinPLogitsWarper(min_p), logits_V) == ids


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_as_many_alternatives_as_were_asked_for(num_top: int) -> None:
    logits_NV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    wanted_NV = logits_NV[:, :40].log_softmax(-1)
    for row, item in enumerate(token_logprobs(logits_NV, [4, 39, 0], num_top, 40)):
        best = wanted_NV[row].argsort(descending=True)[:num_top].tolist()
        assert [token_id for token_id, _ in item.top] == best
        assert item.logprob == pytest.approx(float(wanted_NV[row, [4, 39, 0][row]]), rel=1e-5)
    with pytest.raises(UsageError):
        SamplingParams(logprobs=21)


def test_penalties_at_the_second_occurrence(tokenizer: Tokenizer) -> None:
    """Frequency counts again, presence and repetition do not."""
    logits_V = torch.full((tokenizer.vocab_size,), 2.0)
    for settings, once, twice in (
        ({"frequency_penalty": 0.5}, 1.5, 1.0),
        ({"presence_penalty": 0.5}, 1.5, 1.5),
        ({"repetition_penalty": 4.0}, 0.5, 0.5),
    ):
        state = SamplingState(hot(**settings), [0, 9], tokenizer)
        for wanted in (once, twice):
            state.commit([7])
            adjusted_V = adjusted(state, logits_V)
            assert float(adjusted_V[7]) == wanted
            assert float(adjusted_V[8]) == 2.0
            # The prompt counts for the repetition penalty alone.
            assert float(adjusted_V[9]) == (0.5 if "repetition_penalty" in settings else 2.0)


@pytest.mark.parametrize("stops", [("sea", "whale"), ("whale", "sea")])
@pytest.mark.parametrize("size", [1, 3, 99])
def test_the_first_stop_in_the_text_counts_not_the_first_in_the_list(
    stops: tuple[str, ...], size: int
) -> None:
    stop_filter, text, shown = StopFilter(stops), "the whale in the sea", ""
    for start in range(0, len(text), size):
        if not stop_filter.is_stopped:
            shown += stop_filter.put(text[start : start + size])
    assert (shown, stop_filter.is_stopped) == ("the ", True)


@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (("abab", "b"), "xabab", "xa"),
        (("abc", "bcd"), "zabcd", "z"),
        (("aab",), "aaab", "a"),
        (("aaa", "aab"), "xaab", "x"),
    ],
)
def test_stops_that_overlap(stops: tuple[str, ...], text: str, shown: str, size: int) -> None:
    """Where the text is whole at once the earliest beginning counts; where a stop is complete
    before another that began earlier could be, so does it.
    """
    stop_filter, said = StopFilter(stops), ""
    for start in range(0, len(text), size):
        if not stop_filter.is_stopped:
            said += stop_filter.put(text[start : start + size])
    assert stop_filter.is_stopped
    earliest = min(at for stop in stops if (at := text.find(stop)) >= 0)
    assert said == (text[:earliest] if size == 99 else shown)


@pytest.mark.parametrize("is_end_of_text", [True, False], ids=["eos", "stop id"])
def test_a_stop_token_as_the_last_token_that_is_allowed(
    tokenizer: Tokenizer, is_end_of_text: bool
) -> None:
    """It ends the answer as a stop, not for its length; and no sooner."""
    (letter,) = tokenizer.encode("x")
    end_id = tokenizer.eos_id if is_end_of_text else tokenizer.encode("y")[0]
    params = SamplingParams(max_tokens=2, stop_token_ids=(end_id,))
    for last, reason in ((end_id, "stop"), (letter, "length")):
        answer = Answer(Request([5], params), tokenizer, 100)
        answer.put(letter)
        assert answer.finish_reason is None
        answer.put(last)
        assert answer.finish_reason == reason
        assert answer.text == ("x" if reason == "stop" else "xx")


def test_a_stop_string_in_the_last_token_that_is_allowed(tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("x")
    answer = Answer(Request([5], SamplingParams(max_tokens=1, stop=("x",))), tokenizer, 100)
    answer.put(letter)
    assert (answer.finish_reason, answer.text) == ("stop", "")


def greedy(num_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **settings)


@pytest.mark.parametrize("speculate", [0, 1])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_prompts_around_the_end_of_a_block(
    model: DeepseekV3, tokenizer: Tokenizer, length: int, speculate: int
) -> None:
    """One token, and tokens over the next block's end; afresh, and with the cache's blocks."""
    prompt = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    engine = Engine(model, tokenizer, speculate=speculate, draft_policy=ALWAYS)
    wanted = greedy_ids(model, tokenizer, prompt, 18)
    for num_tokens in (1, 18):
        for _ in range(2):
            [output] = engine.generate([prompt], greedy(num_tokens))
            assert output.token_ids == wanted[:num_tokens]
            assert output.finish_reason == "length"
    [output] = engine.generate([prompt], greedy(1))
    assert output.usage.num_cached_tokens == (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def greedy_ids(model: DeepseekV3, tokenizer: Tokenizer, prompt: list[int], count: int) -> list[int]:
    from small_models import greedy_loop

    return greedy_loop(model, tokenizer, prompt, count)


@pytest.mark.parametrize("speculate", [0, 1])
def test_a_prompt_that_leaves_one_token_and_preemption_at_the_last_block(
    model: DeepseekV3, tokenizer: Tokenizer, speculate: int
) -> None:
    """A cache of three blocks: a prompt of 47 tokens leaves one; two answers that grow into the
    last block preempt each other and both come to the same end.
    """
    memory = memory_of(model, 3, min(speculate, 1))
    engine = Engine(model, tokenizer, cache_memory=memory, speculate=speculate, draft_policy=ALWAYS)
    assert engine.max_positions == 3 * BLOCK_TOKENS
    full = torch.randint(3, 250, (47,), generator=torch.Generator().manual_seed(4)).tolist()
    [output] = engine.generate([full], greedy(5))
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
    assert output.token_ids == greedy_ids(model, tokenizer, full, 1)
    with pytest.raises(UsageError, match="context"):
        engine.generate([[*full, 5]], greedy(1))
    two = [full[:14], full[20:34]]
    outputs = engine.generate(two, greedy(12))
    assert [o.token_ids for o in outputs] == [greedy_ids(model, tokenizer, p, 12) for p in two]
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_blocks == 3


def test_the_first_and_the_last_seed(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """Each gives its own text, again and again; several answers count on from the last to 0."""
    params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
    engine = Engine(model, tokenizer)

    def text_of(seed: int) -> list[int]:
        return engine.generate([[5, 6]], replace(params, seed=seed))[0].token_ids

    first, last = text_of(0), text_of(MAX_SEED)
    assert (text_of(0), text_of(MAX_SEED)) == (first, last)
    assert first != last
    several = engine.generate([[5, 6]] * 2, replace(params, seed=MAX_SEED))
    assert [output.token_ids for output in several] == [last, first]
    for wrong in (-1, MAX_SEED + 1):
        with pytest.raises(UsageError):
            replace(params, seed=wrong)


INF = float("inf")
BY_HAND: list[tuple[LogitChanges, list[float]]] = [
    (LogitChanges(), [1, 2, 3]),
    (LogitChanges(banned_ids=torch.tensor([0, 1, 2])), [1, 2, 3]),
    (LogitChanges(banned_ids=torch.tensor([1, 0])), [-INF, -INF, 3]),
    (LogitChanges(only_ids=torch.tensor([0]), early_ids=torch.tensor([0])), [1, -INF, -INF]),
    (LogitChanges(banned_ids=torch.tensor([0]), only_ids=torch.tensor([0])), [-INF, 2, 3]),
    (LogitChanges(only_ids=torch.tensor([2, 1]), early_ids=torch.tensor([1])), [-INF, -INF, 3]),
    (
        LogitChanges(allowed_V=torch.tensor([True, True, False]), banned_ids=torch.tensor([0, 1])),
        [1, 2, -INF],
    ),
    (LogitChanges(allowed_V=torch.tensor([False, True, True])), [-INF, 2, 3]),
    (
        LogitChanges(seen=(torch.tensor([1]), torch.tensor([2.0])), penalties=(2.0, 0.5, 0.25)),
        [1, 2 / 2 - 2 * 0.5 - 0.25, 3],
    ),
    (
        LogitChanges(
            seen=(torch.tensor([0, 2]), torch.tensor([0.0, 1.0])), penalties=(4.0, 0.0, 1.0)
        ),
        [1 / 4, 2, 3 / 4 - 1],
    ),
    (LogitChanges(bias=(torch.tensor([2]), torch.tensor([-1.5]))), [1, 2, 1.5]),
    (
        LogitChanges(
            bias=(torch.tensor([0]), torch.tensor([9.0])),
            banned_ids=torch.tensor([1, 2]),
            early_ids=torch.tensor([0]),
        ),
        [10, -INF, -INF],
    ),
]


@pytest.mark.parametrize("first", range(len(BY_HAND)))
def test_what_would_leave_no_token_is_left_out_of_its_own_row_alone(first: int) -> None:
    """Rows of every kind together, each kind in turn the first and the last."""
    turned = BY_HAND[first:] + BY_HAND[:first]
    logits_NV = torch.tensor([[1.0, 2.0, 3.0]]).repeat(len(turned), 1)
    change(logits_NV, [changes for changes, _ in turned])
    assert logits_NV.tolist() == [expected for _, expected in turned]
