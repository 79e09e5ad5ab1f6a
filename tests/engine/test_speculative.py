"""Oracles: plain decoding for the text, and the MTP modules over the whole text for the drafts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_models import ALWAYS, BLOCK_TOKENS, greedy_loop, memory_of

from rorqual.engine import Engine, Request, SamplingParams, speculative
from rorqual.engine.draft_policy import FixedDrafts, PayingDrafts
from rorqual.engine.flat_step import Span
from rorqual.engine.runner import Ran
from rorqual.engine.segment import Segment
from rorqual.engine.speculative import Speculator
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@torch.no_grad()
def drafts_after(model: DeepseekV3, ids: list[int], count: int, vocab_size: int) -> list[int]:
    """What the MTP modules guess behind a text, computed without any cache.

    Depth d runs over all it can; beyond the last depth its own states stand for what comes next.
    """
    num_depths = min(count, model.config.num_nextn_predict_layers)
    drafts: list[int] = []
    h = model.hidden(torch.tensor([ids]))[:, :-1]
    for depth in range(1, num_depths + 1):
        text = torch.tensor([(ids + drafts)[depth:]])
        if depth < num_depths:
            h = model.mtp_hidden(depth, h[:, : text.shape[1]], text)
            drafts.append(int(model.head(h[0, -1])[:vocab_size].argmax()))
    while len(drafts) < count:
        text = torch.tensor([(ids + drafts)[num_depths:]])
        out = model.mtp_hidden(num_depths, h, text)
        drafts.append(int(model.head(out[0, -1])[:vocab_size].argmax()))
        h = torch.cat([h, out[:, -1:]], dim=1)
    return drafts


@torch.no_grad()
def acceptance(
    model: DeepseekV3, tokenizer: Tokenizer, prompt: list[int], answer: list[int], count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(drafted, accepted) by position of a greedy answer, from drafts without a cache."""
    drafted, accepted = [0] * count, [0] * count
    done = 1  # the first token comes from the prompt's own step
    while done < len(answer):
        num_drafts = min(count, len(answer) - done - 1)
        ids = prompt + answer[:done]
        num_right = 0
        if len(ids) > min(count, model.config.num_nextn_predict_layers):
            guesses = drafts_after(model, ids, count, tokenizer.vocab_size)[:num_drafts]
            while num_right < len(guesses) and guesses[num_right] == answer[done + num_right]:
                num_right += 1
            for position in range(len(guesses)):
                drafted[position] += 1
                accepted[position] += position < num_right
        done += num_right + 1
    return tuple(drafted), tuple(accepted)


@pytest.mark.parametrize("speculate", [1, 4])
@pytest.mark.parametrize("max_step_tokens", [5, 512])
def test_drafts_are_those_of_the_modules_without_a_cache(
    guesser: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    speculate: int,
    max_step_tokens: int,
) -> None:
    """Chunked prompts, blocks from the prefix cache and rejected drafts leave no trace."""
    prompts = prompts[1:5]
    engine = Engine(
        guesser,
        tokenizer,
        speculate=speculate,
        draft_policy=ALWAYS,
        max_step_tokens=max_step_tokens,
    )
    outputs = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy_loop(guesser, tokenizer, prompt, NUM_TOKENS)
        expected = acceptance(guesser, tokenizer, prompt, output.token_ids, speculate)
        assert (output.usage.drafted, output.usage.accepted) == expected
    assert outputs[1].usage.accepted[0] > 0, "the test model guesses nothing"
    stats = engine.stats()
    for name in ("drafted", "accepted"):
        sums = zip(*(getattr(output.usage, name) for output in outputs), strict=True)
        assert getattr(stats, name) == tuple(map(sum, sums))
    again = engine.generate(prompts, GREEDY)  # from cached blocks, and in company
    assert again == outputs
    assert again[1].usage.num_cached_tokens == 80
    if max_step_tokens == 512:
        assert [output.usage.accepted for output in again] == [
            output.usage.accepted for output in outputs
        ]


def test_each_draft_is_the_modules(
    guesser: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right or wrong: those too that the last depth makes of its own output."""
    made: list[tuple[list[int], tuple[int, ...]]] = []
    draft = Speculator.draft

    def noted(self: Speculator, segments: Sequence[Segment]) -> list[Segment]:
        found = draft(self, segments)
        made.extend((list(s.sequence.token_ids), s.drafts) for s in found if s.drafts)
        return found

    monkeypatch.setattr(Speculator, "draft", noted)
    engine = Engine(guesser, tokenizer, speculate=4, draft_policy=ALWAYS)
    engine.generate([prompts[1][:20]], GREEDY)
    assert max(len(drafts) for _, drafts in made) == 4
    for ids, drafts in made:
        expected = drafts_after(guesser, ids, len(drafts), tokenizer.vocab_size)
        assert list(drafts) == expected


def test_preempted_and_cancelled_answers_leave_speculation_whole(
    guesser: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    num_depths = min(2, guesser.config.num_nextn_predict_layers)
    memory = memory_of(guesser, 11, num_depths)
    engine = Engine(guesser, tokenizer, speculate=2, draft_policy=ALWAYS, cache_memory=memory)
    calm = Engine(guesser, tokenizer)
    engine.cancel(engine.add(Request(prompts[2], GREEDY)))
    abandoned = engine.add(Request(prompts[4], GREEDY))
    engine.step()
    engine.step()
    engine.cancel(abandoned)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=50, ignore_eos=True)
    assert engine.generate(prompts, params) == calm.generate(prompts, params)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_blocks == stats.num_blocks == 11


def test_fewer_steps_than_tokens(
    guesser: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """What speculation is for: an accepted draft saves a step."""
    engine = Engine(guesser, tokenizer, speculate=1, draft_policy=ALWAYS)
    answer = engine.add(Request(prompts[4], GREEDY))
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    assert num_steps == NUM_TOKENS - answer.usage.accepted[0] < NUM_TOKENS


class Clock:
    """An engine whose steps take chosen times: a second, and so much more for each draft."""

    def __init__(self, engine: Engine, seconds_per_draft: float) -> None:
        self.now = 0.0
        self.seconds_per_draft = seconds_per_draft
        run = engine._runner.step

        def timed(spans: Sequence[Span], num_scored: Sequence[int], *, needs_logits: bool) -> Ran:
            self.now += 1.0 + self.seconds_per_draft * (len(spans[0].token_ids) - 1)
            return run(spans, num_scored, needs_logits=needs_logits)

        engine._runner.step = timed  # type: ignore[method-assign]
        engine._draft_policy = PayingDrafts(1, clock=lambda: self.now)


def test_drafting_stops_where_it_does_not_pay_and_the_text_stays(
    guesser: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """Slow verification ends it, fast one brings it back; texts, cache and drafts stay right."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    prompts = prompts[3:]
    plain = Engine(guesser, tokenizer).generate(prompts, params)
    engine = Engine(guesser, tokenizer, speculate=1)
    clock = Clock(engine, seconds_per_draft=2.0)
    for _ in range(3):
        assert engine.generate(prompts, params) == plain
    assert engine.stats().num_drafts == 0
    before = engine.stats().drafted[0]
    assert engine.generate(prompts, params) == plain
    num_tried = engine.stats().drafted[0] - before
    assert num_tried < 0.1 * len(prompts) * params.max_tokens
    clock.seconds_per_draft = 0.01
    for _ in range(20):
        assert engine.generate(prompts, params) == plain
        if engine.stats().num_drafts == 1:
            break
    assert engine.stats().num_drafts == 1
    # After all that starting and stopping the drafts are those of a fresh engine.
    engine._draft_policy = ALWAYS
    fresh = Engine(guesser, tokenizer, speculate=1, draft_policy=ALWAYS).generate(prompts, params)
    for output, expected in zip(engine.generate(prompts, params), fresh, strict=True):
        assert output == expected
        assert output.usage.accepted == expected.usage.accepted


def late_draft(model: DeepseekV3, ids: list[int], first: int, vocab_size: int) -> int:
    """What the first MTP depth guesses if it looks back no further than slot `first`: angles are
    relative, so that it may as well begin there.
    """
    with torch.no_grad():
        h = model.hidden(torch.tensor([ids]))[:, first - 1 : -1]
        out = model.mtp_hidden(1, h, torch.tensor([ids[first:]]))
        return int(model.head(out[0, -1])[:vocab_size].argmax())


@pytest.mark.parametrize("kept", [256, 20])
def test_what_is_drafted_late_is_what_the_kept_states_give(
    guesser: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No module runs while nothing is drafted; its blocks get published as without speculation;
    and drafts begin with as much of the past as is kept, or behind blocks of the cache.
    """
    monkeypatch.setattr(speculative, "KEPT_TOKENS", kept)
    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    never = FixedDrafts(0)
    engine = Engine(guesser, tokenizer, speculate=1, draft_policy=never)
    with monkeypatch.context() as patch:
        for name in ("draft", "run_mtp"):
            patch.setattr(engine._runner, name, lambda *_: 1 // 0)
        answers = [engine.add(Request(prompt, params)) for prompt in prompts]
        for _ in range(50):
            engine.step()
    for answer in answers:
        state = engine._sequences[answer].depths[0]  # type: ignore[index]
        assert sum(map(len, state.rows)) == state.num_rows <= 2 * kept
    engine._draft_policy = ALWAYS
    begun = list(engine._sequences.values())
    firsts = [sequence.depths[0].next_slot for sequence in begun]  # type: ignore[index]
    assert (max(firsts) > 1) == (kept == 20)
    drafted = engine._speculator.draft(engine._scheduler.schedule(1))
    for segment, first in zip(drafted, firsts, strict=True):
        ids = segment.sequence.token_ids
        assert segment.drafts == (late_draft(guesser, ids, first, tokenizer.vocab_size),)
    while engine.has_work:
        engine.step()
    plain = Engine(guesser, tokenizer)
    outputs = [answer.output() for answer in answers]
    assert outputs == plain.generate(prompts, params)
    longer = [[*p, *a.token_ids, 5] for p, a in zip(prompts, answers, strict=True)]
    cached = [output.usage.num_cached_tokens for output in engine.generate(longer, GREEDY)]
    assert cached == [output.usage.num_cached_tokens for output in plain.generate(longer, GREEDY)]
    assert min(cached) >= 64


def test_behind_cached_blocks_that_no_depth_went_through_drafts_begin_anew(
    guesser: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    never = FixedDrafts(0)
    engine = Engine(guesser, tokenizer, speculate=1, draft_policy=never)
    prompt = [*prompts[4], *range(5, 5 + 40)]
    num_known = len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS
    text = engine.generate([prompt], GREEDY)[0].token_ids
    engine._draft_policy = ALWAYS
    for first in (num_known + 1, 1):
        answer = engine.add(Request([*prompt, *text[:3]], GREEDY))
        engine.step()
        assert answer.num_cached_tokens == num_known
        (segment,) = engine._speculator.draft(engine._scheduler.schedule(1))
        expected = late_draft(guesser, segment.sequence.token_ids, first, tokenizer.vocab_size)
        assert segment.drafts == (expected,)
        engine.cancel(answer)
        # The same blocks, made anew by one that drafts: their depths are there from then on.
        engine._pool.forget()
        engine.generate([prompt], GREEDY)
