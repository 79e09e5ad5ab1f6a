"""Oracle: `str.find` over the whole text, which the held-back stream must agree with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine.answer import Answer, StopFilter
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Request, check_prompt
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer

MAX_POSITIONS = 100


def answer_for(tokenizer: Tokenizer, **settings: object) -> Answer:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return Answer(Request([0], params), tokenizer, MAX_POSITIONS)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    """Nothing of a stop leaks, whatever the borders of the pieces."""
    filtered = StopFilter(stops)
    passed = ""
    for piece in pieces:
        passed += filtered.put(piece)
        if filtered.is_stopped:
            break
    passed += filtered.finish()
    text = "".join(pieces)
    if filtered.is_stopped:
        assert text.startswith(passed)
        assert filtered.stop in stops
        assert text[len(passed) :].startswith(filtered.stop or "nothing")
        assert not any(stop in passed for stop in stops)
    else:
        assert passed == text
        assert not any(stop in text for stop in stops)


def test_a_stop_string_across_tokens_is_not_leaked(tokenizer: Tokenizer) -> None:
    answer = answer_for(tokenizer, stop=("sea!",))
    shown = [answer.put(i) for char in "the sea!" for i in tokenizer.encode(char)]
    assert "".join(shown) == answer.text == "the "
    assert answer.finish_reason == "stop"


def put_until_done(answer: Answer, ids: list[int]) -> None:
    for token_id in ids:
        if answer.finish_reason is None:
            answer.put(token_id)


def test_a_beginning_of_a_stop_is_given_back_at_the_end(tokenizer: Tokenizer) -> None:
    answer = answer_for(tokenizer, stop=("sea!",))
    put_until_done(answer, [*tokenizer.encode("the sea"), tokenizer.eos_id])
    assert answer.output().text == "the sea"
    assert answer.output().token_ids[-1] == tokenizer.eos_id


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🐳")
    answer = answer_for(tokenizer)
    shown = [answer.put(token_id) for token_id in ids]
    assert shown == [""] * (len(ids) - 1) + ["🐳"]
    cut = answer_for(tokenizer, max_tokens=1)
    assert cut.put(ids[0]) == "\ufffd"
    assert cut.finish_reason == "length"


def test_the_context_bounds_the_answer(tokenizer: Tokenizer) -> None:
    answer = answer_for(tokenizer, ignore_eos=True)
    put_until_done(answer, [tokenizer.eos_id] * 500)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == MAX_POSITIONS - 1


def test_other_ids_can_end_the_answer(tokenizer: Tokenizer) -> None:
    answer = answer_for(tokenizer, stop_token_ids=(77,))
    put_until_done(answer, [66, 77, 66])
    assert answer.output().token_ids == [66, 77]


@pytest.mark.parametrize("ids", [[], [1] * 10, [-1], [50]])
def test_prompts_that_cannot_be_answered(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="the prompt"):
        check_prompt(ids, vocab_size=50, max_positions=10)
