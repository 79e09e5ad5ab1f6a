"""The fields of OpenAI's `/v1/responses` and of Anthropic's `/v1/messages`: a part of the table in
`fields.py`.
"""

from __future__ import annotations

from rorqual.serve.field_row import (
    CLAUDE,
    CLAUDE_BLOCKS,
    CLAUDE_OUTPUT,
    CLAUDE_TOOLS,
    COUNT_TOKENS,
    INPUT_TOKENS,
    RESPONSE_ITEMS,
    RESPONSE_PARTS,
    RESPONSE_REASONING,
    RESPONSE_TEXT,
    RESPONSE_TOOLS,
    RESPONSES,
    honoured,
    refused,
    without_effect,
)

OPENAI, ANTHROPIC = "OpenAI", "Anthropic"
BOTH, TURNS = (RESPONSES, INPUT_TOKENS), (CLAUDE, COUNT_TOKENS)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
HELLO = {"role": "user", "content": "hello"}
FUNCTION = {"type": "function", "name": "g"}
TOOL = {"name": "g", "input_schema": {"type": "object"}}
RESPONSE_FIELDS = (
    *honoured(BOTH, OPENAI, "model", "nobody", "the served name or an alias", "else 404"),
    *honoured(
        BOTH,
        OPENAI,
        "input",
        [HELLO, HELLO],
        "a text, or items",
        "messages (`input_text`, `output_text`, `refusal`), calls of functions and custom tools "
        "and their outputs, `reasoning`, `item_reference` to what is stored. Images, files and "
        "items of hosted tools are refused by name",
    ),
    *honoured(
        BOTH,
        OPENAI,
        "instructions",
        "Be brief.",
        "text",
        "a system message before all others, for this response alone",
    ),
    *honoured(
        BOTH,
        OPENAI,
        "previous_response_id",
        "resp_0",
        "",
        "the conversation goes on with all items up to and with that response, not with its "
        "instructions",
    ),
    *honoured(
        BOTH,
        OPENAI,
        "tools",
        [FUNCTION],
        "functions and custom tools",
        "`strict` binds as in the chat route and is off when left out. Hosted tools are refused "
        "by name",
    ),
    *honoured(
        BOTH,
        OPENAI,
        "tool_choice",
        "none",
        "`none`, `auto`, `required`, one named tool, `allowed_tools`",
        "as in the chat route",
    ),
    *honoured(
        RESPONSES,
        OPENAI,
        "parallel_tool_calls",
        False,
        "",
        "`false`: the answer ends after its first call",
    ),
    *without_effect(OPENAI, "parallel_tool_calls text", places=INPUT_TOKENS),
    *honoured(
        RESPONSES,
        OPENAI,
        "text.format",
        {"text": {"format": {"type": "json_object"}}},
        "`text`, `json_object`, `json_schema`",
        "and the chat route's extensions",
    ),
    *honoured(
        BOTH,
        OPENAI,
        "reasoning.effort",
        {"reasoning": {"effort": "high"}},
        "",
        "as the chat route's `reasoning_effort`",
    ),
    *honoured(
        BOTH,
        OPENAI,
        "truncation",
        "auto",
        "`auto`, `disabled`",
        "`auto` leaves out the oldest turns where the context is full, until the answer has a "
        "quarter of it, or `max_output_tokens` if that is less",
    ),
    *honoured(RESPONSES, OPENAI, "max_output_tokens", 2, "1..", "as the chat route's `max_tokens`"),
    *honoured(RESPONSES, OPENAI, "temperature", 0.9, "0..2", "as in the chat route"),
    *honoured(RESPONSES, OPENAI, "top_p", 0.5, "above 0, to 1"),
    *honoured(RESPONSES, OPENAI, "top_logprobs", 2, "up to 20", "asks for `logprobs` too"),
    *honoured(
        RESPONSES,
        OPENAI,
        "include",
        ["message.output_text.logprobs"],
        "`message.output_text.logprobs`",
        "others are without effect",
    ),
    *honoured(RESPONSES, OPENAI, "stream", True, "", "with all of OpenAI's events in their order"),
    *honoured(
        RESPONSES,
        OPENAI,
        "store",
        False,
        "default: true",
        "the response is kept with the key that made it (see batches for where and how long); "
        "whole and incomplete ones, no failed ones",
    ),
    *honoured(RESPONSES, OPENAI, "metadata", {"a": "b"}, "", "told again"),
    *honoured(RESPONSES, "vLLM", "top_k", 5, "", "this and the next as in the chat route"),
    *honoured(RESPONSES, "vLLM", "min_p", 0.1),
    *honoured(RESPONSES, "vLLM", "repetition_penalty", 1.2),
    *honoured(RESPONSES, "vLLM", "frequency_penalty", 1),
    *honoured(RESPONSES, "vLLM", "presence_penalty", 1),
    *honoured(RESPONSES, "vLLM", "logit_bias", {"5": 1}),
    *honoured(RESPONSES, "vLLM", "seed", 7),
    *honoured(RESPONSES, "vLLM", "stop", "swims"),
    *honoured(RESPONSES, "vLLM", "stop_token_ids", [5]),
    *honoured(RESPONSES, "vLLM", "ignore_eos", True),
    *honoured(RESPONSES, "vLLM", "min_tokens", 3),
    *honoured(RESPONSES, "vLLM", "skip_special_tokens", False),
    *honoured(RESPONSES, "vLLM", "allowed_token_ids", [5]),
    *honoured(RESPONSES, "vLLM", "include_stop_str_in_output", True),
    *honoured(RESPONSES, "vLLM", "thinking_token_budget", 5),
    *without_effect(
        OPENAI,
        "max_tool_calls service_tier safety_identifier prompt_cache_key prompt_cache_retention "
        "prompt_cache_options background_options access_programs image user stream_options",
        places=RESPONSES,
    ),
    *without_effect(
        "vLLM", "request_id priority media_io_kwargs mm_processor_kwargs", places=RESPONSES
    ),
    *without_effect(OPENAI, "status phase namespace caller async summary", places=RESPONSE_ITEMS),
    *without_effect(OPENAI, "encrypted_content name", places=RESPONSE_ITEMS),
    *without_effect(OPENAI, "annotations logprobs prompt_cache_breakpoint", places=RESPONSE_PARTS),
    *without_effect(
        OPENAI, "allowed_callers async defer_loading output_schema", places=RESPONSE_TOOLS
    ),
    *without_effect(OPENAI, "summary generate_summary context mode", places=RESPONSE_REASONING),
    *without_effect(OPENAI, "personality", places=BOTH, is_noted=True),
    *without_effect(OPENAI, "verbosity", "medium", places=RESPONSE_TEXT, is_noted=True),
    *without_effect(
        "vLLM",
        "cache_salt kv_transfer_params vllm_xargs",
        places=RESPONSES,
        is_noted=True,
    ),
    *without_effect("vLLM", "enable_response_messages", False, places=RESPONSES, is_noted=True),
    *refused(
        OPENAI,
        "background",
        True,
        False,
        note="answers are streamed or waited for",
        places=RESPONSES,
    ),
    *refused(OPENAI, "prompt", {"id": "x"}, note="send input and instructions", places=RESPONSES),
    *refused(OPENAI, "conversation", "x", note="use previous_response_id", places=BOTH),
    *refused(
        OPENAI,
        "context_management",
        [{"type": "compaction"}],
        [],
        note="use truncation",
        places=RESPONSES,
    ),
    *refused(OPENAI, "moderation", {"model": "m"}, note="no moderation", places=RESPONSES),
    *refused(OPENAI, "messages", [HELLO], note="use input", places=BOTH),
    *refused(OPENAI, "max_tokens", 5, note="use max_output_tokens", places=RESPONSES),
    *refused(OPENAI, "max_completion_tokens", 5, note="use max_output_tokens", places=RESPONSES),
    *refused(OPENAI, "n", 2, 1, note="a response is one answer", places=RESPONSES),
    *refused(
        OPENAI,
        "response_format",
        {"type": "json_object"},
        {"type": "text"},
        note="use text.format",
        places=RESPONSES,
    ),
    *refused("vLLM", "structured_outputs", {"regex": "a"}, note="use text", places=RESPONSES),
    *refused("vLLM", "previous_input_messages", [HELLO], [], note="use input", places=RESPONSES),
)
MESSAGE_FIELDS = (
    *honoured(TURNS, ANTHROPIC, "model", "nobody", "the served name or an alias", "else 404"),
    *honoured(CLAUDE, ANTHROPIC, "max_tokens", 2, "1..", "required"),
    *honoured(
        TURNS,
        ANTHROPIC,
        "messages",
        [HELLO, {"role": "assistant", "content": "x"}, HELLO],
        "roles user, assistant, system",
        "blocks `text`, `thinking`, `redacted_thinking` (left out), `tool_use`, `tool_result`. "
        "Images, documents and other blocks are refused by name. Turns of the user that follow "
        "each other are one, parted by a blank line; a last message of the assistant is continued",
    ),
    *honoured(
        TURNS, ANTHROPIC, "system", "Be brief.", "a text, or text blocks, which a blank line parts"
    ),
    *honoured(
        CLAUDE,
        ANTHROPIC,
        "temperature",
        0.9,
        "0..1",
        "used as it is",
    ),
    *honoured(CLAUDE, ANTHROPIC, "top_p", 0.5, "above 0, to 1"),
    *honoured(CLAUDE, ANTHROPIC, "top_k", 5, "0: off"),
    *honoured(CLAUDE, ANTHROPIC, "stop_sequences", ["swims"], "as the chat route's `stop`"),
    *honoured(CLAUDE, ANTHROPIC, "stream", True),
    *honoured(
        TURNS,
        ANTHROPIC,
        "tools",
        [TOOL],
        "tools of your own: `input_schema`, `strict`",
        "the service's own tools are refused by name",
    ),
    *honoured(
        TURNS,
        ANTHROPIC,
        "tool_choice",
        {"type": "none"},
        "`auto`, `any`, `tool`, `none`",
        "`any` and `tool` are enforced by a grammar; `disable_parallel_tool_use`",
    ),
    *honoured(
        CLAUDE,
        ANTHROPIC,
        "output_config.format",
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "`json_schema`",
        "enforced",
    ),
    *honoured(
        CLAUDE,
        ANTHROPIC,
        "output_format",
        {"type": "json_schema", "schema": SCHEMA},
        "",
        "the older place of `output_config.format`",
    ),
    *without_effect(ANTHROPIC, "output_config output_format", places=COUNT_TOKENS),
    *honoured(
        TURNS,
        ANTHROPIC,
        "thinking",
        {"type": "enabled"},
        "an object whose `type` is `disabled` or another",
        "as the chat route's; `display: omitted` leaves the text out",
    ),
    *honoured(
        CLAUDE,
        ANTHROPIC,
        "thinking.budget_tokens",
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        "1..",
        "after so many tokens of reasoning it ends",
    ),
    *without_effect(
        ANTHROPIC,
        "cache_control speed user_profile_id workspace_id betas billing_policy",
        places=TURNS,
    ),
    *without_effect(
        ANTHROPIC,
        "metadata service_tier inference_geo diagnostics fallbacks fallback_credit_token",
        places=CLAUDE,
    ),
    *without_effect(ANTHROPIC, "compaction", places=COUNT_TOKENS),
    *without_effect(
        ANTHROPIC,
        "cache_control citations caller toolset_name signature",
        places=CLAUDE_BLOCKS,
    ),
    *without_effect(
        ANTHROPIC,
        "cache_control defer_loading allowed_callers eager_input_streaming",
        places=CLAUDE_TOOLS,
    ),
    *without_effect(ANTHROPIC, "context_management", places=TURNS, is_noted=True),
    *without_effect(ANTHROPIC, "is_error", False, places=CLAUDE_BLOCKS, is_noted=True),
    *without_effect(ANTHROPIC, "input_examples", [], places=CLAUDE_TOOLS, is_noted=True),
    *without_effect(ANTHROPIC, "effort", "high", places=CLAUDE_OUTPUT, is_noted=True),
    *without_effect(ANTHROPIC, "task_budget", places=CLAUDE_OUTPUT, is_noted=True),
    *refused(ANTHROPIC, "container", "x", note="no tools are run here", places=CLAUDE),
    *refused(
        ANTHROPIC,
        "mcp_servers",
        [{"type": "url", "url": "x", "name": "x"}],
        [],
        note="no tools are run here",
        places=TURNS,
    ),
    *refused(ANTHROPIC, "compaction", {"type": "x"}, note="ask for a summary", places=CLAUDE),
    *refused(ANTHROPIC, "thread", {"type": "create"}, note="send all messages", places=CLAUDE),
)
APIS = (*RESPONSE_FIELDS, *MESSAGE_FIELDS)
