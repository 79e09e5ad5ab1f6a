"""Oracle: `Tokenizer.encode_chat` of the messages that should be left, and its context limit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rorqual.engine import Conversation, Engine, SamplingParams
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(model: DeepseekV3, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer)


def test_turns_are_remembered_and_the_cache_reused(engine: Engine) -> None:
    talk = Conversation(engine, PARAMS, system="Sing.")
    first = "".join(talk.ask("one"))
    assert talk.turns == [("one", first)]
    second = "".join(talk.ask("two"))
    messages = [
        {"role": "system", "content": "Sing."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    prompt_ids = engine.tokenizer.encode_chat(messages)
    fresh = Engine(engine.model, engine.tokenizer)
    assert second == fresh.generate([prompt_ids], PARAMS)[0].text
    talk.clear()
    assert "".join(talk.ask("one")) == first


def test_a_closed_answer_is_remembered_as_far_as_it_came(engine: Engine) -> None:
    talk = Conversation(engine, PARAMS)
    pieces = talk.ask("one")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert talk.turns == [("one", shown)]


def test_the_last_message_is_asked_again_or_forgotten(engine: Engine) -> None:
    talk = Conversation(engine, PARAMS, system="Sing.")
    assert talk.undo() is talk.ask_again() is None
    first, second = "".join(talk.ask("one")), "".join(talk.ask("two"))
    again = talk.ask_again()
    assert again is not None
    assert "".join(again) == second
    assert talk.turns == [("one", first), ("two", second)]
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
    assert talk.undo() == "two"
    assert [m["content"] for m in talk.messages] == ["Sing.", "one", first]


def test_settings_hold_from_the_next_answer_on(engine: Engine) -> None:
    """And tokens are counted, also of an answer that was closed."""
    talk = Conversation(engine, PARAMS)
    assert talk.usage is None
    talk.params = replace(PARAMS, max_tokens=3)
    "".join(talk.ask("one"))
    assert talk.usage is not None
    assert talk.usage.num_output_tokens == 3
    pieces = talk.ask("two")
    next(pieces)
    pieces.close()
    assert talk.usage.num_output_tokens == 1
    talk.system = "Sing."
    assert talk.messages[0] == {"role": "system", "content": "Sing."}


def test_the_oldest_turns_are_dropped(engine: Engine) -> None:
    talk = Conversation(engine, PARAMS, system="Sing.")
    num_dropped = 0
    for number in range(30):
        text = f"{number} " + "sea " * 30
        "".join(talk.ask(text))
        num_dropped += talk.num_dropped_turns
        assert talk.turns[-1][0] == text
    assert num_dropped > 10
    assert len(talk.turns) + num_dropped == 30
    first_left = int(talk.turns[0][0].split()[0])
    assert first_left == num_dropped


def test_a_prompt_that_just_fits_keeps_its_turns(engine: Engine) -> None:
    """The context less what an answer may take is the prompt's, to the last token."""
    turns = [(f"{number} " + "sea " * 120, "deep") for number in range(5)]
    talk = Conversation(engine, PARAMS)
    for num_dropped in (0, 1, 2):
        talk.turns = turns[num_dropped:]
        messages = [*talk.messages, {"role": "user", "content": "and?"}]
        num_free = engine.max_positions - len(engine.tokenizer.encode_chat(messages))
        assert 0 < num_free < engine.max_positions // 2
        for max_tokens, more in ((num_free, 0), (num_free + 1, 1)):
            talk.turns = list(turns)
            talk.params = replace(PARAMS, max_tokens=max_tokens)
            talk.ask("and?")
            assert talk.num_dropped_turns == num_dropped + more


def test_a_message_that_never_fits_changes_nothing(engine: Engine) -> None:
    talk = Conversation(engine, PARAMS)
    "".join(talk.ask("one"))
    with pytest.raises(UsageError, match="does not fit"):
        talk.ask("x1" * 700)
    assert len(talk.turns) == 1


def test_raw_prompts_are_independent(engine: Engine) -> None:
    talk = Conversation(engine, PARAMS, is_raw=True)
    first = "".join(talk.ask("The whale"))
    ids = engine.tokenizer.encode("The whale", bos=True)
    assert first == engine.generate([ids], PARAMS)[0].text == "".join(talk.ask("The whale"))
    with pytest.raises(UsageError, match="system"):
        Conversation(engine, PARAMS, system="Sing.", is_raw=True)
