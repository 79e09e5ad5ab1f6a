"""Oracle: the ranges of DeepSeek's and OpenAI's API, one value outside of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rorqual.engine.grammar import Grammar
from rorqual.engine.params import NUMBERS, WHOLE_NUMBERS, SamplingParams
from rorqual.errors import UsageError

NAN = float("nan")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": NAN},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": 0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": NAN},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -2.1},
        {"logit_bias": {3: 101.0}},
        {"logit_bias": {-1: 1.0}},
        {"allowed_token_ids": ()},
        {"seed": -1},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} is out of range"):
        SamplingParams(**settings)


def test_an_answer_with_a_grammar_ends_where_the_grammar_does() -> None:
    with pytest.raises(UsageError, match="ignore_eos"):
        SamplingParams(grammar=Grammar("json_object"), ignore_eos=True)
    with pytest.raises(UsageError, match="unknown kind"):
        Grammar("xml")  # type: ignore[arg-type]


def test_nothing_can_be_changed_afterwards() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[3] = 50.0
    assert params.logit_bias == {3: 1.0}
    with pytest.raises(TypeError):
        params.logit_bias[3] = 2.0  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    assert dataclasses.replace(params, seed=1).logit_bias == {3: 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        *[{name: "0.3"} for name in NUMBERS],
        *[{name: True} for name in NUMBERS],
        *[{name: "64"} for name in WHOLE_NUMBERS],
        *[{name: True} for name in WHOLE_NUMBERS],
        *[{name: 1.5} for name in WHOLE_NUMBERS],
        {"temperature": None},
        {"max_tokens": None},
        {"ignore_eos": "no"},
        {"include_stop_str_in_output": 1},
        {"stop": 5},
        {"stop": (5,)},
        {"stop": None},
        {"stop": "END"},
        {"stop": b"END"},
        {"stop_token_ids": 5},
        {"stop_token_ids": ("5",)},
        {"stop_token_ids": "5"},
        {"stop_token_ids": (True,)},
        {"allowed_token_ids": 5},
        {"allowed_token_ids": ("5",)},
        {"allowed_token_ids": (True,)},
        {"logit_bias": [(3, 1.0)]},
        {"logit_bias": {3: "1"}},
        {"logit_bias": {3: True}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {"3": 1.0}},  # JSON's keys
        {"grammar": "root ::= a"},
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} has the wrong type"):
        SamplingParams(**settings)


def test_one_text_that_ends_answers_is_a_list_of_one() -> None:
    with pytest.raises(UsageError, match=r'fix:      stop=\("END",\)'):
        SamplingParams(stop="END")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3), top_p=1)
    assert (params.temperature, params.max_tokens, params.top_p) == (0.5, 3, 1)
    three = np.int64(3)
    ids: Any = {"stop_token_ids": (three,), "logit_bias": {three: np.float32(1)}}
    params = SamplingParams(**ids)
    assert (params.stop_token_ids, params.logit_bias) == ((3,), {3: 1.0})
