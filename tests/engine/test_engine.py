"""Oracles: transformers' `generate` with the same weights, and the whole text through the model for
every token: whatever runs beside an answer, and however it is cut, the tokens are the same.
"""

from __future__ import annotations

import random

import pytest
import torch
from small_models import ALWAYS, BLOCK_TOKENS, greedy_loop, memory_of
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import rorqual
from rorqual.engine import Engine, Request, SamplingParams
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, build
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder

NUM_TOKENS = 32
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy_loop(model, tokenizer, prompt, NUM_TOKENS) for prompt in prompts]


def tokens_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(prompts, GREEDY)]


def test_greedy_tokens_equal_transformers(
    model: DeepseekV3, prompts: list[list[int]], expected: list[list[int]], tokenizer: Tokenizer
) -> None:
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**model.config.to_hf())).eval()
    names = theirs.state_dict().keys()
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if k in names})
    beyond = list(range(tokenizer.vocab_size, model.config.vocab_size))
    for prompt, ours in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
            suppress_tokens=beyond,
        )
        assert out[0, len(prompt) :].tolist() == ours


@pytest.mark.parametrize("max_step_tokens", [1, 7, 512])
@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("speculate", [0, 1, 3])
def test_batches_chunks_and_drafts_change_no_token(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    expected: list[list[int]],
    max_step_tokens: int,
    max_batch: int,
    speculate: int,
) -> None:
    engine = Engine(
        model,
        tokenizer,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        speculate=speculate,
        draft_policy=ALWAYS,
    )
    assert tokens_of(engine, prompts) == expected
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("use_prefix_cache", [False, True])
@pytest.mark.parametrize("speculate", [0, 2])
def test_the_prefix_cache_changes_no_token(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    expected: list[list[int]],
    use_prefix_cache: bool,
    speculate: int,
) -> None:
    engine = Engine(
        model,
        tokenizer,
        use_prefix_cache=use_prefix_cache,
        speculate=speculate,
        draft_policy=ALWAYS,
    )
    assert tokens_of(engine, prompts) == expected
    longer = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    for cut in (0, 15, 16, 30):
        begun = [text[: len(text) - cut] for text in longer]
        outputs = engine.generate(begun, GREEDY)
        for prompt, whole, output in zip(prompts, longer, outputs, strict=True):
            start = len(whole) - cut
            assert output.token_ids[:cut] == whole[start:]
            assert len(prompt) <= start
    stats = engine.stats()
    assert (stats.num_prefix_hit_tokens > 500) == use_prefix_cache
    assert stats.num_prefix_hit_tokens % BLOCK_TOKENS == 0
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("speculate", [0, 1])
@pytest.mark.parametrize("use_prefix_cache", [False, True])
def test_preemption_changes_no_token(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    expected: list[list[int]],
    speculate: int,
    use_prefix_cache: bool,
) -> None:
    engine = Engine(
        model,
        tokenizer,
        speculate=speculate,
        draft_policy=ALWAYS,
        use_prefix_cache=use_prefix_cache,
        cache_memory=memory_of(model, 13, speculate),
        max_step_tokens=40,
    )
    assert engine.max_positions == 13 * BLOCK_TOKENS
    assert tokens_of(engine, prompts) == expected
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_blocks == stats.num_blocks == 13
    sampled = SamplingParams(temperature=1, seed=5, max_tokens=NUM_TOKENS, ignore_eos=True)
    calm = Engine(model, tokenizer, speculate=speculate, draft_policy=ALWAYS)
    assert engine.generate(prompts, sampled) == calm.generate(prompts, sampled)


@pytest.mark.parametrize("speculate", [0, 2])
def test_cancels_at_random_leak_no_block_and_disturb_nobody(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    expected: list[list[int]],
    speculate: int,
) -> None:
    engine = Engine(
        model,
        tokenizer,
        speculate=speculate,
        draft_policy=ALWAYS,
        cache_memory=memory_of(model, 20, min(speculate, 1)),
        max_step_tokens=30,
        max_batch=5,
    )
    rng = random.Random(7)
    open_answers, num_done = [], 0
    for _ in range(150):
        if rng.random() < 0.4:
            number = rng.randrange(len(prompts))
            answer = engine.add(Request(prompts[number], GREEDY))
            open_answers.append((number, answer))
        if open_answers and rng.random() < 0.2:
            _, answer = open_answers.pop(rng.randrange(len(open_answers)))
            engine.cancel(answer)
            engine.cancel(answer)  # a second time does nothing
        for answer, piece in engine.step():
            assert any(answer is known for _, known in open_answers)
            assert (piece.usage is None) == (piece.finish_reason is None)
        for number, answer in list(open_answers):
            if answer.finish_reason is not None:
                assert answer.token_ids == expected[number]
                open_answers.remove((number, answer))
                num_done += 1
    for _, answer in open_answers:
        engine.cancel(answer)
    stats = engine.stats()
    assert not engine.has_work
    assert engine.step() == []
    assert (stats.num_waiting, stats.num_running) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert num_done > 5


def test_seeded_answers_are_the_same_in_any_company(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=24)
    one = Engine(model, tokenizer, max_batch=1).generate(prompts, params)
    five = Engine(model, tokenizer, max_batch=5, max_step_tokens=9).generate(prompts, params)
    drafted = Engine(model, tokenizer, speculate=2, draft_policy=ALWAYS).generate(prompts, params)
    assert one == five == drafted
    other = SamplingParams(temperature=1.0, top_p=0.9, seed=99, max_tokens=24)
    assert one != Engine(model, tokenizer).generate(prompts, other)
    assert all(i < tokenizer.vocab_size for output in one for i in output.token_ids)


def test_pieces_add_up_to_the_answer(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(model, tokenizer, speculate=1, draft_policy=ALWAYS)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
    answer = engine.add(Request(prompts[2], params))
    pieces = []
    while engine.has_work:
        pieces += [piece for owner, piece in engine.step() if owner is answer]
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [i for piece in pieces for i in piece.token_ids] == answer.token_ids
    assert [entry.token_id for piece in pieces for entry in piece.logprobs] == answer.token_ids
    assert [piece.finish_reason for piece in pieces][-1] == "length"
    usage = pieces[-1].usage
    assert usage is not None
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (90, 20)
    assert usage.num_cached_tokens == 0


@torch.no_grad()
def test_logprobs_of_answer_and_prompt_equal_the_models(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """Oracle: log-softmax of the whole text's logits, over the tokenizer's ids."""
    engine = Engine(model, tokenizer, max_step_tokens=25)
    params = SamplingParams(
        temperature=0, max_tokens=9, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    for _ in range(2):  # the second time the prompt is in the cache, and is computed all the same
        outputs = engine.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt + output.token_ids
        logits = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size]
        table = logits.log_softmax(-1)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs[1:], *output.logprobs]
        assert len(entries) == len(ids) - 1
        for place, entry in enumerate(entries):
            assert entry is not None
            assert entry.token_id == ids[place + 1]
            assert entry.logprob == pytest.approx(float(table[place, entry.token_id]), abs=1e-4)
            assert len(entry.top) == (2 if place < len(prompt) - 1 else 3)
            assert entry.top[0][1] == pytest.approx(float(table[place].max()), abs=1e-4)


def test_the_context_is_a_clear_limit(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(UsageError, match="does not fit"):
        engine.generate([[5], [5] * 700], GREEDY)
    last = engine.generate([[5] * 699], GREEDY)[0]
    assert (len(last.token_ids), last.finish_reason) == (1, "length")
    short = Engine(model, tokenizer, max_model_len=50, speculate=3, draft_policy=ALWAYS)
    with pytest.raises(UsageError, match="does not fit"):
        short.add(Request([5] * 50, GREEDY))
    whole = short.generate([[5] * 30], GREEDY)[0]
    assert (len(whole.token_ids), whole.finish_reason) == (20, "length")


def test_the_engine_is_public() -> None:
    assert rorqual.Engine is Engine
    assert rorqual.SamplingParams is SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_step_tokens": 0}, "max_step_tokens"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"speculate": -1}, "speculate"),
        ({"max_model_len": 701}, "max_model_len"),
        ({"kv_cache_dtype": "int3"}, "int3"),
        ({"cache_memory": 100}, "too small"),
        ({"cache_memory": 1.5}, "share"),
    ],
)
def test_settings_without_meaning_are_refused(
    model: DeepseekV3, tokenizer: Tokenizer, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(model, tokenizer, **settings)  # type: ignore[arg-type]


def test_a_model_that_does_not_suit_is_refused(tokenizer: Tokenizer, model: DeepseekV3) -> None:
    with pytest.raises(UsageError, match="does not belong"):
        Engine(build(model.config.with_changes(vocab_size=100)), tokenizer)
    plain = build(model.config.with_changes(num_nextn_predict_layers=0))
    with pytest.raises(UsageError, match="no MTP module"):
        Engine(plain, tokenizer, speculate=1)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        Engine(plain)


def test_the_device_of_an_engine(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """A folder's weights go where they are told to; a model that is there is not moved."""
    assert Engine(model, tokenizer, device="cpu").device == torch.device("cpu")
    assert Engine("tiny", device="cpu", max_batch=1).device == torch.device("cpu")
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        Engine("tiny", device="tpu")
    with pytest.raises(UsageError, match=r"another device\n  found:    cpu\n  expected: meta"):
        Engine(model, tokenizer, device=torch.device("meta"))
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        rorqual.load(ModelFolder.find("tiny").path, device="tpu")
