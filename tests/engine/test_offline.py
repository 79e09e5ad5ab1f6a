"""Oracle: the same requests through `Engine.generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from small_models import ALWAYS

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.offline import WINDOW_PER_ROW
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def test_progress_and_order(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    done: list[int] = []
    outputs = Engine(model, tokenizer).generate(prompts, GREEDY, on_progress=done.append)
    assert done == list(range(1, len(prompts) + 1))
    assert [output.num_prompt_tokens for output in outputs] == [len(p) for p in prompts]
    with pytest.raises(UsageError):
        Engine(model, tokenizer).generate([[5], []], GREEDY, on_progress=done.append)


def test_requests_are_drawn_late(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    """A first answer that is long holds up the others in a bounded window; the order stays."""
    num_drawn = 0

    def requests() -> Iterator[Request]:
        nonlocal num_drawn
        for number in itertools.count():
            num_drawn += 1
            long = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
            short = SamplingParams(temperature=0, max_tokens=1)
            yield Request([5, 6 + number % 50], long if number == 0 else short)

    engine = Engine(model, tokenizer, max_batch=2)
    outputs = engine.generate_each(requests())
    assert len(next(outputs).token_ids) == 120
    assert num_drawn <= 2 * WINDOW_PER_ROW + 1
    assert len(next(outputs).token_ids) == 1
    outputs.close()  # type: ignore[attr-defined]
    assert not engine.has_work


def test_streamed_text_equals_the_output(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(model, tokenizer)
    for prompt, whole in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        stream = engine.stream(prompt, GREEDY)
        assert "".join(stream) == whole.text == tokenizer.decode(whole.token_ids)
        assert stream.output == whole


def test_streams_and_batches_share_an_engine(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(model, tokenizer)
    expected = Engine(model, tokenizer).generate(prompts, GREEDY)
    stream = engine.stream(prompts[2], GREEDY)
    pieces = iter(stream)
    text = next(pieces) + next(pieces)
    assert engine.generate(prompts, GREEDY) == expected
    assert text + "".join(pieces) == expected[2].text
    assert stream.output == expected[2]


def test_a_second_turn_runs_only_what_is_new(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(model, tokenizer)
    first = engine.stream(prompts[2], GREEDY)
    assert "".join(first)
    assert first.output.usage.num_cached_tokens == 0
    longer = [*prompts[2], *first.output.token_ids, 9, 8, 7]
    second = engine.stream(longer, GREEDY)
    assert "".join(second)
    # Whole blocks of what has run: the last sampled token never did.
    assert second.output.usage.num_cached_tokens == (len(longer) - 4) // 16 * 16
    assert second.output == Engine(model, tokenizer).generate([longer], GREEDY)[0]


def test_an_abandoned_stream_frees_its_blocks(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(model, tokenizer)
    never_begun = engine.stream(prompts[2], GREEDY)
    assert never_begun.text == ""
    stream = engine.stream(prompts[2], GREEDY)
    next(iter(stream))
    assert engine.has_work
    stream.close()
    stats = engine.stats()
    assert not engine.has_work
    assert stats.num_free_blocks == stats.num_blocks
    whole = Engine(model, tokenizer).generate([prompts[2]], GREEDY)[0]
    assert "".join(engine.stream(prompts[2], GREEDY)) == whole.text


def test_stop_strings_end_the_text(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    for speculate in (0, 2):
        engine = Engine(model, tokenizer, speculate=speculate, draft_policy=ALWAYS)
        whole = engine.generate([prompts[4]], GREEDY)[0].text
        stop = whole[20:25]
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=("never", stop))
        stopped = engine.generate([prompts[4]], params)[0]
        assert stopped.text == whole[: whole.index(stop)]
        assert stopped.finish_reason == "stop"
        assert "".join(engine.stream(prompts[4], params)) == stopped.text
