"""Whether a prompt ends inside `<think>`. Oracle: the turns as a person reads them, written out."""

from __future__ import annotations

import pytest

from rorqual.tokenizer import Tokenizer, train_tokenizer
from rorqual.tokenizer.special import (
    ASSISTANT,
    BOS,
    EOS,
    THINK_BEGIN,
    THINK_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    USER,
)
from rorqual.tokenizer.thinking import ReasoningCounter, is_thinking

CUT = f"{BOS}{USER}a{ASSISTANT}{THINK_BEGIN}Hm{EOS}"
OUTPUTS = f"{TOOL_OUTPUTS_BEGIN}1{TOOL_OUTPUTS_END}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The whale swims."], 300)


@pytest.mark.parametrize(
    ("prompt", "is_inside"),
    [
        ("", False),
        (f"{BOS}{USER}a{ASSISTANT}", False),
        (f"{BOS}{USER}a{ASSISTANT}{THINK_BEGIN}\n", True),
        (f"{BOS}{USER}a{ASSISTANT}{THINK_BEGIN}Hm", True),
        (f"{BOS}{USER}a{ASSISTANT}{THINK_BEGIN}Hm{THINK_END}So", False),
        (f"{BOS}{USER}a{ASSISTANT}{THINK_END}", False),
        (f"{CUT}{USER}b{ASSISTANT}", False),
        (f"{CUT}{USER}b{ASSISTANT}The wh", False),
        (f"{CUT}{USER}b{ASSISTANT}{THINK_BEGIN}\n", True),
        (f"{CUT}{OUTPUTS}", False),
        (f"{BOS}{USER}a{ASSISTANT}{THINK_BEGIN}Hm{OUTPUTS}", False),
        (CUT, False),
        (f"{THINK_BEGIN}raw text without turns", True),
    ],
)
def test_the_last_turn_decides(tokenizer: Tokenizer, prompt: str, is_inside: bool) -> None:
    assert is_thinking(tokenizer.encode(prompt, allow_special=True), tokenizer) == is_inside


@pytest.mark.parametrize(
    ("answer", "is_inside", "num_tokens"),
    [
        ("<think>ab</think>cd", False, 2),
        (" \n<think>ab</think><think>cd", False, 2),
        ("x<think>ab</think>", False, 0),
        (" x<think>ab</think>", False, 0),
        ("<think>ab</think> <think>cd</think>", False, 2),
        ("<think></think>", False, 0),
        ("ab</think>cd<think>e", True, 2),
        ("ab", True, 2),
        (f"ab{EOS}", True, 2),
        ("ab", False, 0),
    ],
)
def test_reasoning_is_counted_by_tokens(
    tokenizer: Tokenizer, answer: str, is_inside: bool, num_tokens: int
) -> None:
    letters = {letter: tokenizer.encode(letter) for letter in "abcdex"}
    assert all(len(ids) == 1 for ids in letters.values())
    counter = ReasoningCounter(tokenizer, is_inside=is_inside)
    ids = []
    for part in answer.replace("ab", "a\0b").split("\0"):  # no merge may make one token of two
        ids += tokenizer.encode(part, allow_special=True)
    for token_id in ids:
        counter.put(token_id)
    assert counter.num_tokens == num_tokens
