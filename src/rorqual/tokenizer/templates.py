"""Chat templates: which one a checkpoint gets, what it can do, and running it.

V3's and R1's published templates write tool rounds that no one can read back: a single call is not
closed, and from the second round on calls and outputs have no opening token. Ours take their place.
What another template can do is asked of itself: of its variables, or by rendering a small
conversation.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.tokenizer.special import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    THINK_BEGIN,
    THINK_END,
    TOOL_OUTPUT_BEGIN,
)
from rorqual.tokenizer.tool_calls import to_json

THINKING_SWITCHES = ("thinking", "enable_thinking")
"""The variables by which templates are told whether to think: V3.1's, and most others'."""

_PROBE = {"add_generation_prompt": True, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


@functools.cache
def v3_template() -> str:
    """The text of `chat_template.jinja`."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=8)
def mended(template: str) -> str:
    """Ours for the templates that V3 and R1 were published with; any other as it is.

    One that shows the tools was changed by somebody, and is theirs.
    """
    is_published = "is_output_first" in template and "tool▁calls" in template
    if not is_published or "tools" in variables_of(template):
        return template
    return _r1_template(template) if THINK_END in template else v3_template()


def _r1_template(published: str) -> str:
    """V3's format, but what was thought in earlier turns is left out. What R1's versions differ in
    is kept: whether the answer begins in `<think>`, and a newline between outputs.
    """
    opening = re.search(rf"{ASSISTANT}({THINK_BEGIN}(?:\\n|\n)?)", published)
    between = re.search(rf"(?:\\n|\n)(?={TOOL_OUTPUT_BEGIN})", published)
    changes = [
        ("(message['content'] or '')", f"(message['content'] or '').split('{THINK_END}')[-1]"),
        (f"- '{ASSISTANT}' -", f"- '{ASSISTANT}{opening[1] if opening else ''}' -"),
        ("('' if ns.in_outputs", f"('{between[0] if between else ''}' if ns.in_outputs"),
    ]
    template = v3_template()
    for old, new in changes:
        assert template.count(old) == 1, f"chat_template.jinja has changed at {old}"
        template = template.replace(old, new)
    return template


@functools.lru_cache(maxsize=8)
def variables_of(template: str) -> frozenset[str]:
    """The variables that a template reads; none if it is broken, which rendering will say."""
    from jinja2 import TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    try:
        return frozenset(find_undeclared_variables(_environment().parse(template)))
    except TemplateSyntaxError:
        return frozenset()


def has_thinking_switch(template: str) -> bool:
    """Whether the template reads a variable that turns thinking on or off."""
    return not variables_of(template).isdisjoint(THINKING_SWITCHES)


@dataclass(frozen=True)
class CallForm:
    """How a template wants an assistant's calls: `is_text`, with the arguments as a text and not as
    an object; `empty`, what stands for no content beside them.
    """

    is_text: bool = True
    empty: str | None = None


@functools.lru_cache(maxsize=8)
def call_form(template: str) -> CallForm:
    """The first form in which a template writes a small call whole."""
    forms = [CallForm(is_text, empty) for empty in (None, "") for is_text in (True, False)]
    return next((form for form in forms if _writes_calls(template, form)), CallForm())


def _writes_calls(template: str, form: CallForm) -> bool:
    arguments = {"probe": "a"}
    function = {"name": "f", "arguments": to_json(arguments) if form.is_text else arguments}
    call = {"id": "functions.f:0", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": form.empty, "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_call_id": "functions.f:0", "name": "f"},
    ]
    try:
        text = run_template(template, {"messages": messages, **_PROBE})
    except TokenizerError:
        return False
    return '"probe"' in text if form.is_text else "probe" in text


@functools.lru_cache(maxsize=8)
def reasoning_marks(template: str) -> tuple[str, str]:
    """What stands before and after an answer's reasoning: R1 sets it off by newlines."""
    messages = [{"role": "user", "content": "x"}]
    wish = dict.fromkeys(THINKING_SWITCHES, True)
    try:
        text = run_template(template, {"messages": messages, **_PROBE, **wish})
    except TokenizerError:
        text = ""
    spaced = f"{THINK_BEGIN}\n"
    return (spaced, f"\n{THINK_END}\n\n") if text.endswith(spaced) else (THINK_BEGIN, THINK_END)


def run_template(template: str, variables: dict[str, Any]) -> str:
    """The rendered text; TokenizerError for a template that is broken or refuses."""
    import jinja2

    try:
        text: str = _compile(template).render(variables)
    except (jinja2.TemplateError, TypeError, ValueError) as problem:
        raise TokenizerError(
            f"the chat template failed: {problem}",
            fix="check the conversation against the template, or remove the template "
            "from the tokenizer's folder to use DeepSeek-V3's",
        ) from None
    return text


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    # As transformers sets it up, so that a template renders alike in both.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
