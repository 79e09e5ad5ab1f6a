"""Other models' chat templates: what a conversation says reaches the prompt, or is an error.

Oracles: the format written out, transformers on the published template for what that renders right,
and the property itself: each text of a message occurs in the prompt.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from published import V31, r1, r1_thinking

from rorqual.errors import TokenizerError
from rorqual.tokenizer import Tokenizer, load_tokenizer
from rorqual.tokenizer.templates import mended, v3_template

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CALLS, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
CALL_END, CALLS_END = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
OUTPUTS, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "v3": v3_template(),
    "r1": mended(r1()),
    "r1 thinking": mended(r1_thinking()),
    "v3.1": V31,
    "chatml": CHATML,
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any, call_id: str = "c0") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def with_template(small: Tokenizer, template: str) -> Tokenizer:
    return dataclasses.replace(small, chat_template=template)


USER = said("user", "Why?")


@pytest.mark.parametrize(
    ("name", "thinking", "before", "after"),
    [
        ("v3", None, "<think>", "</think>"),
        ("v3.1", None, "<think>", "</think>"),
        ("v3.1", False, "<think>", "</think>"),
        ("v3.1", True, "<think>", "</think>"),
        ("r1", None, "<think>", "</think>"),
        ("r1 thinking", None, "<think>\n", "\n</think>\n\n"),
    ],
)
@pytest.mark.parametrize("content", ["", "So"])
def test_a_prefix_goes_on_with_its_reasoning(
    small: Tokenizer, name: str, thinking: bool | None, before: str, after: str, content: str
) -> None:
    tokenizer = with_template(small, TEMPLATES[name])
    last = said("assistant", content, reasoning_content="Hm.", prefix=True)
    expected = f"{BOS}<｜User｜>Why?<｜Assistant｜>{before}Hm." + (
        after + content if content else ""
    )
    assert tokenizer.render_chat([USER, last], thinking=thinking) == expected
    ids = tokenizer.encode_chat([USER, last], thinking=thinking)
    assert ids == tokenizer.encode(expected, allow_special=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prefix_may_write_its_reasoning_out(small: Tokenizer, name: str) -> None:
    """Templates that leave out what stands before `</think>` keep it in a prefix."""
    tokenizer = with_template(small, TEMPLATES[name])
    for text in ("<think>Hm", "<think>Hm</think>So", "\n<think>\nHm\n</think>\n\nSo"):
        for thinking in (None, True, False):
            last = said("assistant", text, prefix=True)
            prompt = tokenizer.render_chat([USER, last], thinking=thinking)
            opening = "<|im_start|>assistant\n" if name == "chatml" else "<｜Assistant｜>"
            assert prompt.endswith(opening + text)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["", "The wh", "a</think>b", f"x{EOS}", " y\n"])
def test_a_prefix_ends_the_prompt(small: Tokenizer, name: str, text: str) -> None:
    tokenizer = with_template(small, TEMPLATES[name])
    last = said("assistant", text, prefix=True)
    whole = tokenizer.render_chat([USER, last])
    assert whole.endswith(text)
    tail = {"v3.1": "<｜Assistant｜></think>", "chatml": "<|im_start|>assistant\n"}
    assert whole.removesuffix(text).endswith(tail.get(name, "<｜Assistant｜>"))


def test_reasoning_quotes_no_mark(small: Tokenizer) -> None:
    """`</think>` inside `reasoning_content` is text: it does not end the reasoning."""
    end = small.special_ids["</think>"]
    for template in TEMPLATES.values():
        last = said("assistant", "", reasoning_content="a</think>b", prefix=True)
        ids = with_template(small, template).encode_chat([USER, last])
        assert end not in ids
        assert small.decode(ids).endswith("a</think>b")


ROUNDS = [
    USER,
    said("assistant", None, tool_calls=[call("f", '{"a": 1}'), call("g", "{}", "c1")]),
    said("tool", "one", tool_call_id="c0"),
    said("tool", "two", tool_call_id="c1"),
    said("assistant", "<think>Hm</think>Again.", tool_calls=[call("f", "{}")]),
    said("tool", "three", tool_call_id="c0"),
    said("assistant", "<think>So</think>Done."),
    said("user", "Thanks"),
]


@pytest.mark.parametrize(
    ("template", "between", "opening"),
    [
        (r1(), "", ""),
        (r1_thinking(), "", "<think>\n"),
        (r1_thinking().replace("{{'<｜tool▁output▁b", "{{'\\n<｜tool▁output▁b"), "\n", "<think>\n"),
    ],
)
def test_r1s_tool_rounds_are_well_formed(
    small: Tokenizer, tmp_path: Path, template: str, between: str, opening: str
) -> None:
    with_template(small, template).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    first = f'{CALL}function{SEP}f\n```json\n{{"a": 1}}\n```{CALL_END}'
    g, f = (f"{CALL}function{SEP}{name}\n```json\n{{}}\n```{CALL_END}" for name in "gf")
    expected = (
        f"{BOS}<｜User｜>Why?<｜Assistant｜>{CALLS}{first}\n{g}{CALLS_END}{EOS}"
        f"{OUTPUTS}{OUTPUT}one{OUTPUT_END}{between}{OUTPUT}two{OUTPUT_END}{OUTPUTS_END}"
        f"Again.{CALLS}{f}{CALLS_END}{EOS}{OUTPUTS}{OUTPUT}three{OUTPUT_END}{OUTPUTS_END}"
        f"Done.{EOS}<｜User｜>Thanks<｜Assistant｜>{opening}"
    )
    assert tokenizer.render_chat(ROUNDS) == expected
    # As published a second round's calls and outputs do not open, and what is said beside is lost.
    with pytest.raises(TokenizerError, match=r"messages\[4\]: is left out of the prompt"):
        with_template(small, template).render_chat(ROUNDS)


@pytest.mark.parametrize("template", [r1(), r1_thinking()])
def test_what_r1s_template_renders_right_stays(
    small: Tokenizer, tmp_path: Path, template: str
) -> None:
    with_template(small, template).save(tmp_path)
    oracle: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    talk = [
        said("system", "Be brief."),
        said("system", "Be kind."),
        USER,
        said("assistant", "<think>Hm</think>\n\nSo.", reasoning_content="Hm"),
        said("user", "And?"),
    ]
    looks = [USER, {**ROUNDS[1], "content": "I look."}, *ROUNDS[2:4]]
    turns = [talk, talk[:4], talk[2:3], looks[:2], looks]
    for messages in turns:
        for generation in (True, False):
            text = oracle.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
            assert tokenizer.render_chat(messages, None, generation) == text


def test_v31s_tool_rounds(small: Tokenizer) -> None:
    """As published: no fences, no outer pair of outputs, `</think>` where a user spoke last."""
    v31 = with_template(small, V31)
    expected = (
        f'{BOS}<｜User｜>Why?<｜Assistant｜></think>{CALLS}{CALL}f{SEP}{{"a": 1}}{CALL_END}'
        f"{CALL}g{SEP}{{}}{CALL_END}{CALLS_END}{EOS}{OUTPUT}one{OUTPUT_END}{OUTPUT}two{OUTPUT_END}"
        f"<think>Hm</think>Again.{CALLS}{CALL}f{SEP}{{}}{CALL_END}{CALLS_END}{EOS}"
        f"{OUTPUT}three{OUTPUT_END}<think>So</think>Done.{EOS}<｜User｜>Thanks<｜Assistant｜><think>"
    )
    assert v31.render_chat(ROUNDS, thinking=True) == expected
    assert v31.render_chat(ROUNDS[:6], thinking=True) == expected[: expected.index("<think>So")]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["</think>", "<think>a</think>b", "ü\u2028", EOS, "\ufdd0\ufdd0", "```", "  ", "a\nb"]
)
objects = st.dictionaries(texts, texts | st.integers() | st.lists(texts, max_size=2), max_size=2)
made_calls = st.lists(st.builds(call, st.sampled_from(["f", "get_x"]), objects), max_size=2)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [said("system", draw(texts)) for _ in range(draw(st.integers(0, 2)))]
    for _ in range(draw(st.integers(1, 3))):
        messages.append(said("user", draw(texts)))
        for calls in draw(st.lists(made_calls, max_size=2)):
            if draw(st.booleans()):  # as OpenAI's clients write arguments
                calls = [call(c["function"]["name"], dump(c)) for c in calls]
            content = draw(texts) if not calls or draw(st.booleans()) else None
            messages.append(said("assistant", content, tool_calls=calls))
            messages += [said("tool", draw(texts), tool_call_id="c0") for _ in calls]
    if draw(st.booleans()):
        reasoning = draw(st.none() | texts)
        last = said("assistant", draw(texts), prefix=True, reasoning_content=reasoning)
        messages.append(last)
    return messages


def dump(made: dict[str, Any]) -> str:
    return json.dumps(made["function"]["arguments"], ensure_ascii=True)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(list(TEMPLATES)),
    messages=conversations(),
    thinking=st.sampled_from([None, True, False]),
    has_tools=st.booleans(),
)
def test_nothing_that_is_said_is_lost(
    small: Tokenizer,
    name: str,
    messages: list[dict[str, Any]],
    thinking: bool | None,
    has_tools: bool,
) -> None:
    tokenizer = with_template(small, TEMPLATES[name])
    tools = [CLOCK] if has_tools else None
    prompt = tokenizer.render_chat(messages, tools, thinking=thinking)
    assert small.decode(tokenizer.encode_chat(messages, tools, thinking=thinking)) == prompt
    assert not has_tools or '{"name": "clock"}' in prompt
    for message in messages:
        content = message["content"] or ""
        is_prefix = bool(message.get("prefix"))
        if message["role"] == "assistant" and not is_prefix:
            content = content.rpartition("</think>")[2]
        assert content.strip() in prompt
        if is_prefix:
            assert (message["reasoning_content"] or "") in prompt
            assert prompt.endswith(content) or not content
        for made in message.get("tool_calls", []):
            arguments = made["function"]["arguments"]
            value = json.loads(arguments) if isinstance(arguments, str) else arguments
            forms = [json.dumps(value), json.dumps(value, ensure_ascii=False)]
            assert any(made["function"]["name"] in prompt and form in prompt for form in forms)


LOSING = [
    ("{{ messages[-1].content }}", [USER, said("assistant", "So"), said("user", "x")], r"\[0\]"),
    (  # as R1's distilled models have it: the last system text alone
        "{% for m in messages if m.role == 'system' %}{% set s = m.content %}"
        "{% if loop.last %}{{ s }}{% endif %}{% endfor %}{{ messages[-1].content }}",
        [said("system", "Be brief."), said("system", "Be kind."), USER],
        r"messages\[0\]",
    ),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", ROUNDS, r"messages\[1\]\.tool_calls\[0"),
    (  # what was said before does not stand for what is said now
        "{% for m in messages[:2] %}{{ m.content }}{% endfor %}",
        [said("user", "Go on."), said("assistant", "So"), said("user", "Go  on.")],
        r"messages\[2\]",
    ),
    (  # as a template of V3.2: arguments as an object only, and then its values alone
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments.probe }}{% endfor %}{% endfor %}",
        [USER, said("assistant", "", tool_calls=[call("f", '{"b": "lost"}')])],
        r"messages\[1\]\.tool_calls\[0",
    ),
    (
        "{% for m in messages if m.role != 'tool' %}{{ m.content or '' }}"
        "{{ m.tool_calls }}{% endfor %}",
        ROUNDS,
        r"messages\[[23]\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "where"), LOSING)
def test_what_a_template_leaves_out_is_an_error(
    small: Tokenizer, template: str, messages: list[dict[str, Any]], where: str
) -> None:
    with pytest.raises(TokenizerError, match=where + r"[\s\S]*left out of the prompt"):
        with_template(small, template).render_chat(messages)


def test_a_template_that_leaves_out_a_prefix_or_a_tool_is_an_error(small: Tokenizer) -> None:
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    last = said("assistant", "So", prefix=True)
    with pytest.raises(TokenizerError, match="leaves out the message that is to be continued"):
        with_template(small, only_users).render_chat([USER, last])
    with pytest.raises(TokenizerError, match=r"tools\[0\]: is left out of the prompt"):
        with_template(small, only_users + "{% if tools %}{% endif %}").render_chat([USER], [CLOCK])


def test_arguments_go_in_as_the_template_writes_them(small: Tokenizer) -> None:
    """`arguments | tojson` would quote a text: such a template gets the object."""
    talk = [USER, said("assistant", None, tool_calls=[call("f", '{"a":"\\u00fc"}')])]
    assert 'f{"a": "ü"}' in with_template(small, CHATML).render_chat(talk)
    assert 'f<｜tool▁sep｜>{"a":"\\u00fc"}<' in with_template(small, V31).render_chat(talk)
    talk[1] = said("assistant", "", tool_calls=[call("f", {"a": "ü"})])
    assert 'f{"a": "ü"}' in with_template(small, CHATML).render_chat(talk)
    assert 'f<｜tool▁sep｜>{"a": "ü"}<' in with_template(small, V31).render_chat(talk)
    talk[1] = said("assistant", None, tool_calls=[call("f", "{cut")])
    assert "f<｜tool▁sep｜>{cut<" in with_template(small, V31).render_chat(talk)
    with pytest.raises(TokenizerError, match=r"messages\[1\]\.tool_calls\[0\]: has arguments that"):
        with_template(small, CHATML).render_chat(talk)


def test_a_template_that_cannot_take_null_gets_an_empty_text(small: Tokenizer) -> None:
    """As R1-0528's does: it looks for `</think>` in the content, before it asks for calls."""
    template = "{% for m in messages %}{% if '</think>' in m.content %}{% endif %}{{ m.content }}"
    template += "{{ m.tool_calls }}{% endfor %}"
    talk = [USER, said("assistant", None, tool_calls=[call("f", '{"a": "b"}')])]
    assert "'f'" in with_template(small, template).render_chat(talk)


def test_empty_lists_of_calls_are_no_calls(small: Tokenizer) -> None:
    for template in TEMPLATES.values():
        tokenizer = with_template(small, template)
        plain = tokenizer.render_chat([USER, said("assistant", "So.")])
        for calls in ([], None):
            assert (
                tokenizer.render_chat([USER, said("assistant", "So.", tool_calls=calls)]) == plain
            )


def test_json_is_written_with_the_options_of_transformers(small: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{{ messages[0] | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ messages | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
        "{{ strftime_now('%Y') }}"
    )
    tokenizer = with_template(small, template)
    tokenizer.save(tmp_path)
    oracle: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [said("user", "ü<")]
    assert tokenizer.render_chat(messages) == oracle.apply_chat_template(messages, tokenize=False)


def test_only_published_templates_are_mended() -> None:
    assert mended(V31) == V31
    assert mended(CHATML) == CHATML
    with_tools = r1() + "{% if tools %}{{ tools }}{% endif %}"
    assert mended(with_tools) == with_tools
    assert re.search("</think>", mended(r1()))
    assert "<think>\\n" in mended(r1_thinking())
    assert "<think>" not in mended(r1())
