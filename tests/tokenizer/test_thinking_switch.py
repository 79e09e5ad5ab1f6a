"""The thinking switch of chat templates. Oracle: transformers on the same template."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers
from published import V31, r1, r1_thinking

from rorqual.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]
QWEN = "{{ messages[0].content }}{% if enable_thinking is not defined or enable_thinking %}<think>"
QWEN += "{% else %}<think></think>{% endif %}"


@pytest.fixture
def v31(small: Tokenizer) -> Tokenizer:
    return dataclasses.replace(small, chat_template=V31)


def test_a_templates_own_variables_tell_of_the_switch(small: Tokenizer, v31: Tokenizer) -> None:
    def has_switch(template: str) -> bool:
        return dataclasses.replace(small, chat_template=template).has_thinking_switch

    assert v31.has_thinking_switch
    assert has_switch(QWEN)
    # Set by the template if the caller does not, as V3.1's published text has it.
    assert has_switch("{% if not thinking is defined %}{% set thinking = false %}{% endif %}")
    assert not small.has_thinking_switch
    assert not has_switch(r1())
    assert not has_switch(r1_thinking())
    assert not has_switch("{{ 'thinking' }}{% set thinking = 1 %}{{ thinking }} enable_thinking")
    assert not has_switch("{% broken")


@pytest.mark.parametrize("template", [V31, QWEN, r1_thinking()])
@pytest.mark.parametrize("thinking", [None, False, True])
def test_the_switch_reaches_the_template(
    small: Tokenizer, tmp_path: Path, template: str, thinking: bool | None
) -> None:
    ours = dataclasses.replace(small, chat_template=template)
    ours.save(tmp_path)
    oracle: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wish = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    options = {"add_generation_prompt": True, **wish}
    text = oracle.apply_chat_template(HI, tokenize=False, **options)
    assert ours.render_chat(HI, thinking=thinking) == text
    ids = oracle.apply_chat_template(HI, return_dict=False, **options)
    assert ours.encode_chat(HI, thinking=thinking) == ids


def test_v31_closes_its_reasoning_unless_it_thinks(v31: Tokenizer) -> None:
    off, on = "<｜Assistant｜></think>", "<｜Assistant｜><think>"
    assert v31.render_chat(HI).endswith(off)
    assert v31.render_chat(HI, thinking=False).endswith(off)
    assert v31.render_chat(HI, thinking=True).endswith(on)
    begun = [*HI, {"role": "assistant", "content": "So", "prefix": True}]
    assert v31.render_chat(begun, thinking=False).endswith(off + "So")
    assert v31.render_chat(begun, thinking=True).endswith(on + "So")
