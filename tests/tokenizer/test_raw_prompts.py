"""Raw prompts with names of special tokens. Oracle: the ids of the names, by hand."""

from __future__ import annotations

import pytest

from rorqual.tokenizer import Tokenizer, train_tokenizer
from rorqual.tokenizer.special import ASSISTANT, BOS, EOS, EOT, THINK_BEGIN, TOOL_CALLS_BEGIN, USER


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer(["The whale swims in the sea."] * 4, 280)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<｜User｜>hi<｜Assistant｜>", [USER, "hi", ASSISTANT]),
        ("<|User|>hi<|Assistant|>", [USER, "hi", ASSISTANT]),
        ("<｜User|>hi", [USER, "hi"]),
        ("<|begin_of_sentence|><|User|>", [USER]),
        ("<|begin▁of_sentence｜>x", ["x"]),
        ("x<|begin_of_sentence|>", ["x", BOS]),
        ("a<|end_of_sentence|>b", ["a", EOS, "b"]),
        ("<|EOT|><｜EOT｜>", [EOT, EOT]),
        ("<think><|tool_calls_begin|>", [THINK_BEGIN, TOOL_CALLS_BEGIN]),
        ("<|user|>< |User|><|Users|>", ["<|user|>< |User|><|Users|>"]),
        ("<|im_start|>", ["<|im_start|>"]),
        ("", []),
    ],
)
def test_names_become_tokens_in_either_writing(
    small: Tokenizer, text: str, parts: list[str]
) -> None:
    ids = [small.bos_id]
    for part in parts:
        ids += [small.special_ids[part]] if part in small.special_ids else small.encode(part)
    assert small.encode_raw(text, reads_special=True) == ids
    is_named = any(part in small.special_ids for part in parts) or "begin" in text
    assert small.names_special(text) == is_named


def test_without_asking_names_are_text(small: Tokenizer) -> None:
    text = "<｜User｜><|User|>"
    assert small.encode_raw(text) == [small.bos_id, *small.encode(text)]
    assert not set(small.encode_raw(text)[1:]) & set(small.special_ids.values())


def test_a_begin_of_sentence_may_be_left_out(small: Tokenizer) -> None:
    assert small.encode_raw("a", bos=False) == small.encode("a")
    assert small.encode_raw("<|User|>", bos=False, reads_special=True) == [small.user_id]
