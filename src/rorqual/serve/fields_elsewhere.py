"""Fields of the chat route for which `/v1/responses` and `/v1/messages` have another, or no place:
a part of the table in `fields.py`. They are refused with the one to use.
"""

from __future__ import annotations

from typing import Any

from rorqual.serve.field_row import CLAUDE, RESPONSES, refused

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMS: tuple[tuple[str, str, Any], ...] = (
    ("vLLM", "guided_json", SCHEMA),
    ("vLLM", "guided_regex", "a+"),
    ("vLLM", "guided_choice", ["a", "b"]),
    ("vLLM", "guided_grammar", 'root ::= "a"'),
    ("SGLang, llama.cpp", "json_schema", SCHEMA),
    ("SGLang", "regex", "a+"),
    ("SGLang", "ebnf", 'root ::= "a"'),
    ("llama.cpp", "grammar", 'root ::= "a"'),
)
"""What asks for a form on the chat route."""
ELSEWHERE = (
    *(
        row
        for servers, name, example in FORMS
        for place, note in ((RESPONSES, "use text.format"), (CLAUDE, "use output_config.format"))
        for row in refused(servers, name, example, note=note, places=place)
    ),
    *refused("llama.cpp", "n_predict", 5, note="use max_output_tokens", places=RESPONSES),
    *refused("llama.cpp", "n_predict", 5, note="use max_tokens", places=CLAUDE),
    *refused("OpenAI", "max_completion_tokens", 5, note="use max_tokens", places=CLAUDE),
    *refused("OpenAI", "max_output_tokens", 5, note="use max_tokens", places=CLAUDE),
    *refused("OpenAI", "n", 2, 1, note="a message is one answer", places=CLAUDE),
    *refused("llama.cpp", "n_cmpl", 2, 1, note="a message is one answer", places=CLAUDE),
    *refused("llama.cpp", "n_cmpl", 2, 1, note="a response is one answer", places=RESPONSES),
    *refused("OpenAI", "stop", "x", [], note="use stop_sequences", places=CLAUDE),
    *refused(
        "llama.cpp",
        "repeat_penalty",
        1.2,
        1,
        note="use repetition_penalty",
        places=(RESPONSES, CLAUDE),
    ),
    *refused(
        "SGLang",
        "no_stop_trim",
        True,
        False,
        note="use include_stop_str_in_output",
        places=(RESPONSES, CLAUDE),
    ),
    *refused("OpenAI", "logprobs", True, False, note="use top_logprobs", places=RESPONSES),
    *refused("llama.cpp", "n_probs", 2, 0, note="use top_logprobs", places=RESPONSES),
    *(
        row
        for servers, name, example, off in (
            ("OpenAI", "logprobs", True, False),
            ("OpenAI", "top_logprobs", 2, 0),
            ("llama.cpp", "n_probs", 2, 0),
        )
        for row in refused(
            servers, name, example, off, note="a message has no logprobs", places=CLAUDE
        )
    ),
    *(
        row
        for servers, name, example in (
            ("OpenAI", "reasoning_effort", "low"),
            ("vLLM, SGLang", "chat_template_kwargs", {"thinking": True}),
        )
        for place, note in ((RESPONSES, "use reasoning.effort"), (CLAUDE, "use thinking"))
        for row in refused(servers, name, example, note=note, places=place)
    ),
    *refused("DeepSeek", "thinking", True, note="use reasoning.effort", places=RESPONSES),
    *refused("SGLang", "reasoning", {"effort": "low"}, note="use thinking", places=CLAUDE),
    *refused(
        "vLLM",
        "thinking_token_budget",
        5,
        -1,
        note="use thinking.budget_tokens",
        places=CLAUDE,
    ),
    *refused(
        "OpenAI",
        "parallel_tool_calls",
        False,
        True,
        note="use tool_choice.disable_parallel_tool_use",
        places=CLAUDE,
    ),
    *refused("vLLM, SGLang", "continue_final_message", True, False, places=RESPONSES),
    *refused(
        "vLLM, SGLang",
        "continue_final_message",
        False,
        True,
        note="a last message of the assistant is always continued",
        places=CLAUDE,
    ),
    *refused(
        "OpenAI",
        "response_format",
        {"type": "json_object"},
        {"type": "text"},
        note="use output_config.format",
        places=CLAUDE,
    ),
    *refused(
        "vLLM",
        "structured_outputs",
        {"regex": "a"},
        note="use output_config.format",
        places=CLAUDE,
    ),
)
