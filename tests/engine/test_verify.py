"""Oracle: plain decoding with the same seed (identity), and closed-form joint laws (chi-square).

A small language of six tokens whose next token depends on the last one stands for the model.
"""

from __future__ import annotations

import itertools
from array import array
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling_steps import adjusted, probabilities, verified

from rorqual.engine import verify as verify_module
from rorqual.engine.grammar import Grammar, GrammarCompiler
from rorqual.engine.params import SamplingParams
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import Scores, verify
from rorqual.errors import CheckpointError, UsageError
from rorqual.tokenizer import Tokenizer

NUM_SAMPLES = 20_000
NUM_QUICK_SAMPLES = 4_000
MIN_P_VALUE = 1e-3  # seeds are fixed: a right program passes always, a wrong one with this chance
EOS_ID, FIRST_ID = 5, 0
SMALL: Any = SimpleNamespace(vocab_size=6, eos_id=EOS_ID, special_ids={})
# Row i: logits after token i. The two last columns are rows of the model beyond the tokenizer.
TABLE = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
TABLE[:, 6:] = 50.0

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.7, "top_p": 0.7},
    {"top_k": 3, "min_p": 0.2},
    {"repetition_penalty": 1.8, "frequency_penalty": 0.9, "presence_penalty": -0.5},
    {"allowed_token_ids": (0, 2, 3), "top_p": 0.9, "logit_bias": {3: 1.0}},
    {"top_p": 0.8, "presence_penalty": 1.5, "logit_bias": {1: -100, 2: 0.7}},
]


def state_of(seed: int | None, prompt: tuple[int, ...] = (FIRST_ID,), **settings: Any) -> Any:
    params = SamplingParams(**{"temperature": 1.0, "ignore_eos": True, "seed": seed} | settings)
    return SamplingState(params, prompt, SMALL)


def logits_after(*token_ids: int) -> torch.Tensor:
    return TABLE[list(token_ids)]


def plain_ids(num_tokens: int, state: SamplingState) -> list[int]:
    ids = [FIRST_ID]
    for _ in range(num_tokens):
        (result,) = verified(logits_after(ids[-1]), [[]], [state])
        ids += result.token_ids
        assert result.num_accepted == 0
    return ids[1:]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, *SETTINGS])
def test_speculation_gives_the_text_of_plain_decoding(settings: dict[str, Any]) -> None:
    """The same seed, the same ids, whatever is drafted: right, wrong and mixed drafts."""
    guesses = torch.Generator().manual_seed(1)
    for seed in range(20):
        expected = plain_ids(30, state_of(seed, **settings))
        state, ids = state_of(seed, **settings), [FIRST_ID]
        while len(ids) <= 30:
            num_drafts = int(torch.randint(4, (), generator=guesses))
            right = expected[len(ids) - 1 : len(ids) - 1 + num_drafts]
            noise = torch.rand(len(right), generator=guesses) < 0.4
            drafts = [(d + 1) % 6 if bad else d for d, bad in zip(right, noise, strict=True)]
            (result,) = verified(logits_after(ids[-1], *drafts), [drafts], [state])
            num_right = next((i for i, bad in enumerate(noise) if bad), len(drafts))
            assert result.num_accepted == num_right
            assert len(result.token_ids) == num_right + 1
            ids += result.token_ids
        assert ids[1:31] == expected


def joint_law(settings: dict[str, Any]) -> torch.Tensor:
    """(6, 6): probability of each pair of first tokens."""
    law = torch.zeros(6, 6)
    for first, second in itertools.product(range(6), repeat=2):
        state = state_of(0, **settings)
        one = probabilities(adjusted(state, TABLE[FIRST_ID, :6]), state.params)[first]
        if one > 0:
            state.commit([first])
            law[first, second] = (
                one * probabilities(adjusted(state, TABLE[first, :6]), state.params)[second]
            )
    return law


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Of Pearson's chi-square, by Wilson and Hilferty's cube root."""
    expected = law * counts.sum()
    is_common = expected >= 5
    assert counts[law == 0].sum() == 0, "an impossible pair came up"
    rare, rare_expected = counts[~is_common].sum(), expected[~is_common].sum()
    chi_square = ((counts - expected)[is_common] ** 2 / expected[is_common]).sum()
    chi_square += (rare - rare_expected) ** 2 / rare_expected.clamp(min=1)
    freedom = int(is_common.sum())
    z = (chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    return 1 - NormalDist().cdf(float(z) / (2 / (9 * freedom)) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "num_samples"),
    zip(SETTINGS, [NUM_SAMPLES, *[NUM_QUICK_SAMPLES] * 5], strict=True),
)
def test_two_tokens_with_speculation_follow_the_joint_law(
    settings: dict[str, Any], num_samples: int
) -> None:
    """Half of the answers get the likeliest token as draft, half an unlikely one."""
    law = joint_law(settings)
    first_law = law.sum(1)
    drafts = [[int(first_law.argmax())], [int(first_law.argmin())]] * (num_samples // 2)
    states = [state_of(index, **settings) for index in range(num_samples)]
    logits = torch.cat([logits_after(FIRST_ID, draft[0]) for draft in drafts])
    results = verified(logits, drafts, states)
    late = [i for i, result in enumerate(results) if len(result.token_ids) == 1]
    firsts = [results[i].token_ids[0] for i in late]
    seconds = verified(logits_after(*firsts), [[]] * len(late), [states[i] for i in late])
    pairs = {i: result.token_ids for i, result in enumerate(results)}
    pairs |= {
        i: (first, *second.token_ids)
        for i, first, second in zip(late, firsts, seconds, strict=True)
    }
    counts = torch.zeros(6, 6)
    for first, second in pairs.values():
        counts[first, second] += 1
    assert p_value(counts, law) > MIN_P_VALUE
    # The likeliest token is accepted as often as it is likely: no draft is wasted.
    accepted = sum(result.num_accepted for result in results[::2]) / (num_samples / 2)
    likely = float(first_law.max())
    four_sigma = 4 * (likely * (1 - likely) / (num_samples / 2)) ** 0.5
    assert accepted == pytest.approx(likely, abs=four_sigma + 1e-6)


def test_the_law_test_finds_a_wrong_law() -> None:
    law = joint_law({})
    counts = (joint_law({"temperature": 1.1}) * NUM_SAMPLES).round()
    assert p_value(counts, law) < MIN_P_VALUE


def test_penalties_and_bias_are_their_closed_forms() -> None:
    state = state_of(
        0, (0, 1, 7), repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    for token_id in (3, 3, 4):
        state.commit([token_id])
    logits = torch.tensor([2.0, -2.0, 1.0, 4.0, -1.0, 0.5])
    expected = [1.0, -4.0, 1.0, 2.0 - 1.25, -2.0 - 0.75, 0.5]
    assert adjusted(state, logits).tolist() == expected
    assert logits.tolist() == [2.0, -2.0, 1.0, 4.0, -1.0, 0.5]
    biased = adjusted(state_of(0, logit_bias={1: 3.5, 2: -100}), logits)
    assert biased.tolist() == [2.0, 1.5, -torch.inf, 4.0, -1.0, 0.5]
    barred = adjusted(state_of(0, allowed_token_ids=(1, 3, 3), logit_bias={1: 3.5}), logits)
    assert barred.tolist() == [-torch.inf, 1.5, -torch.inf, 4.0, -torch.inf, -torch.inf]
    # What is banned and allowed is banned, unless nothing else is left.
    both = adjusted(state_of(0, allowed_token_ids=(1, 2), logit_bias={1: -100}), logits)
    assert both.tolist() == [-torch.inf] * 2 + [1.0] + [-torch.inf] * 3


def test_an_end_id_ends_the_step() -> None:
    for settings in ({}, {"presence_penalty": 0.5}):
        forced = torch.full((3, 6), 0.0)
        forced[:, EOS_ID] = 99.0
        state = state_of(0, temperature=0.0, ignore_eos=False, **settings)
        (result,) = verified(forced, [[EOS_ID, EOS_ID]], [state])
        assert (result.token_ids, result.num_accepted) == ((EOS_ID,), 1)


def test_answers_of_all_kinds_share_a_step() -> None:
    """Each gets what it gets alone; log-probabilities come where asked for."""
    kinds: list[dict[str, Any]] = [*SETTINGS, {"temperature": 0.0}, {"logprobs": 2}]
    drafts = [[1, 2], [], [3], [0, 0, 4], [2, 3], [], [2, 1], [int(TABLE[FIRST_ID, :6].argmax())]]
    rows = [logits_after(FIRST_ID, *draft) for draft in drafts]
    together = verify(Scores(torch.cat(rows)), drafts, [state_of(3, **kind) for kind in kinds])
    for row, draft, kind, result in zip(rows, drafts, kinds, together, strict=True):
        assert verify(Scores(row), [draft], [state_of(3, **kind)]) == [result]
        num_logprobs = len(result.token_ids) if "logprobs" in kind else 0
        assert len(result.logprobs) == num_logprobs
    assert verify(Scores(torch.zeros(0, 8)), [], []) == []


def test_what_cannot_be_sampled_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        verify(Scores(torch.full((1, 6), float("nan"))), [[]], [state_of(0)])
    for settings in (
        {"logit_bias": {6: 1.0}},
        {"stop_token_ids": (6,)},
        {"allowed_token_ids": (1, 6)},
    ):
        with pytest.raises(UsageError, match="does not exist"):
            state_of(0, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_a_grammar_does_not_disturb_speculation(tokenizer: Tokenizer, seed: int) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=1.0, seed=seed, grammar=Grammar("regex", "[a-e]{12}"))
    compiler = GrammarCompiler(tokenizer)
    logits = torch.randn(40, tokenizer.vocab_size, generator=torch.Generator().manual_seed(seed))
    plain, ids = SamplingState(params, [0], tokenizer, compiler), []
    while not ids or ids[-1] != tokenizer.eos_id:
        ids += verified(logits[len(ids)][None], [[]], [plain])[0].token_ids
    state, got = SamplingState(params, [0], tokenizer, compiler), list[int]()
    while len(got) < len(ids):
        right = ids[len(got) : len(got) + 3]
        drafts = [*right[:2], 9] if len(got) % 2 else right  # 9 is no letter of the grammar
        assert state.prune(drafts) == (right[:2] if len(got) % 2 else right)[: len(drafts)]
        (result,) = verified(logits[len(got) : len(got) + 1 + len(drafts)], [drafts], [state])
        got += result.token_ids
    assert got == ids


def test_a_failure_between_two_rounds_leaves_the_grammar_where_it_was(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted drafts have moved it by then."""
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=1.0, seed=1, grammar=Grammar("regex", "[a-e]{12}"))
    compiler = GrammarCompiler(tokenizer)
    logits = torch.randn(4, tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))

    def fresh() -> SamplingState:
        return SamplingState(params, [0], tokenizer, compiler)

    one_by_one, drafts = fresh(), list[int]()
    for row in logits[:3]:
        drafts += verified(row[None], [[]], [one_by_one])[0].token_ids
    expected = verify(Scores(logits), [drafts], [fresh()])
    assert expected[0].num_accepted == 3
    state, num_calls = fresh(), 0
    choose = verify_module.choose

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise RuntimeError("out of memory")
        return choose(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "choose", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            verify(Scores(logits), [drafts], [state])
    assert verify(Scores(logits), [drafts], [state]) == expected
    assert verify(Scores(logits), [drafts], [state]) == expected
    assert verified(logits, [drafts], [state]) == expected


class Picky:
    """A guide that refuses whatever is drawn first in its first `num_picky` places."""

    is_cut_short = False

    def __init__(self, num_picky: int, num_taken: int = 0) -> None:
        self.num_picky, self.num_taken = num_picky, num_taken
        self.refused: list[int] = []

    def fork(self) -> Picky:
        return Picky(self.num_picky, self.num_taken)

    def rewind(self) -> None: ...

    def allowed(self) -> torch.Tensor:
        allowed_V = torch.ones(6, dtype=torch.bool)
        allowed_V[self.refused] = False
        return allowed_V

    def admits(self, token_id: int) -> bool:
        is_picky = self.num_taken < self.num_picky and not self.refused
        if is_picky:
            self.refused.append(token_id)
        return not is_picky

    def put(self, token_id: int) -> None:
        self.num_taken += 1
        self.refused.clear()


@pytest.mark.parametrize("num_picky", [0, 1, 2])
def test_a_refusal_takes_later_digits_of_its_own_random_number_alone(num_picky: int) -> None:
    """Three places in one step, equal chances: which token a number means is known by hand."""
    for seed in range(20):
        state = state_of(seed)
        state.guide = Picky(num_picky)
        wanted = []
        for place in range(3):
            uniform, left = state.uniform(place), list(range(6))
            if place < num_picky:
                left.pop(int(uniform * 6))
                uniform = uniform * 32 % 1.0
            wanted.append(left[int(uniform * len(left))])
        (result,) = verify(Scores(torch.zeros(3, 6)), [wanted[:2]], [state])
        assert (list(result.token_ids), result.num_accepted) == (wanted, 2)


def test_the_likeliest_alone_decide_as_their_logits_do() -> None:
    """Drafts right, wrong and beyond an end id; a row that is not finite is an error."""
    generator = torch.Generator().manual_seed(4)
    for number in range(60):
        drafts = [
            torch.randint(4, (number % 4,), generator=generator).tolist()
            for _ in range(1 + number % 3)
        ]
        logits = torch.randn(sum(map(len, drafts)) + len(drafts), 6, generator=generator)
        logits[:, 4:] -= 5.0
        settings = {"temperature": 0.0, "stop_token_ids": (2,), "ignore_eos": True}
        states = [state_of(0, **settings) for _ in drafts]
        assert all(state.is_plain for state in states)
        expected = verify(Scores(logits), drafts, states)
        likeliest = array("q", logits.argmax(-1).tolist())
        assert verify(Scores(None, likeliest), drafts, states) == expected
    with pytest.raises(CheckpointError, match="not finite"):
        verify(Scores(None, [1, -1]), [[1]], states[:1])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"logprobs": 1},
        {"logit_bias": {3: 1.0}},
        {"frequency_penalty": 0.5},
        {"min_tokens": 2},
        {"allowed_token_ids": (1, 2)},
    ],
)
def test_who_asks_for_more_than_the_likeliest_is_not_plain(settings: dict[str, Any]) -> None:
    assert state_of(0, **{"temperature": 0.0}).is_plain
    state = state_of(0, **{"temperature": 0.0, **settings})
    assert not state.is_plain
    if "min_tokens" in settings:
        state.commit([1, 1])
        assert state.is_plain
