"""The fields that do here what their servers say: a part of the table in `fields.py`."""

from __future__ import annotations

from rorqual.serve.field_row import CHAT, COMPLETIONS, ROUTES, honoured

HELLO = {"role": "user", "content": "hello"}
ALL, EXTENDED = "OpenAI", "vLLM, SGLang"
HONOURED = (
    *honoured(ROUTES, ALL, "model", "nobody", "the served name or an alias", "else 404"),
    *honoured(
        ROUTES,
        ALL,
        "max_tokens",
        2,
        "1.. (completions: 0 only scores the prompt); -1: the default",
        "default: 4096 or what the context leaves, if less; an answer that fills the context ends "
        "with `length`",
    ),
    *honoured(
        ROUTES,
        ALL,
        "temperature",
        0.9,
        "0..2",
        "**never remapped**: 0.3 is 0.3 (OpenAI's range; the terminal and Python take up to 100). "
        "Left out: the model's own advice, else 0.3",
    ),
    *honoured(ROUTES, ALL, "top_p", 0.5, "above 0, to 1"),
    *honoured(ROUTES, ALL, "frequency_penalty", 1, "-2..2", "over the answer's tokens"),
    *honoured(ROUTES, ALL, "presence_penalty", 1, "-2..2", "over the answer's tokens"),
    *honoured(ROUTES, ALL, "logit_bias", {"5": 1}, "token id -> -100..100", "-100 bans"),
    *honoured(
        ROUTES,
        ALL,
        "seed",
        7,
        "64-bit integer, signed or not; its lower 63 bits count",
        "choice i of `n` draws from seed + i. With `--batch-invariant` the same text with and "
        "without drafts and in any company, in every dtype, with one and the same number of "
        "threads; without it up to rounding",
    ),
    *honoured(
        ROUTES,
        ALL,
        "stop",
        "swims",
        "a text or up to 16 of up to 1024 characters",
        "not part of the answer",
    ),
    *honoured(ROUTES, ALL, "n", 2, "1..128", "prompts x n at most 128"),
    *honoured(ROUTES, ALL, "stream", True),
    *honoured(
        ROUTES,
        ALL,
        "stream_options.include_usage",
        {"stream": True, "stream_options": {"include_usage": True}},
        "",
        "usage comes in a last chunk without choices",
    ),
    *honoured(
        ROUTES,
        "vLLM",
        "stream_options.continuous_usage_stats",
        {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        "",
        "with `include_usage`: each chunk has `usage` so far, its three totals",
    ),
    *honoured(ROUTES, EXTENDED, "top_k", 5, "1..; 0 and -1 switch it off"),
    *honoured(ROUTES, EXTENDED, "min_p", 0.1, "0..1"),
    *honoured(ROUTES, EXTENDED, "repetition_penalty", 1.2, "above 0"),
    *honoured(ROUTES, EXTENDED, "stop_token_ids", [5], "", "they end the answer too"),
    *honoured(
        ROUTES,
        "vLLM, SGLang, llama.cpp",
        "ignore_eos",
        True,
        "",
        "the end-of-sentence token does not end the answer; not with a grammar",
    ),
    *honoured(
        ROUTES,
        EXTENDED,
        "min_tokens",
        3,
        "0..`max_tokens`",
        "that many tokens come before any end, unless a grammar leaves nothing but the end; a "
        "stop string that begins in them is text",
    ),
    *honoured(
        ROUTES,
        EXTENDED,
        "skip_special_tokens",
        False,
        "",
        "`false` shows the names of tokens that begin, end and fill texts; that of the token which "
        "ended the answer only with `include_stop_str_in_output`, as vLLM has it",
    ),
    *honoured(
        CHAT,
        ALL,
        "messages",
        [HELLO, HELLO],
        "roles system, developer (the same), user, assistant, tool",
        "`content`: a string or text parts (`text`, `input_text`, `output_text`, `refusal`), which "
        "follow each other directly; other parts are refused. `name` is accepted: the prompt "
        "format has no place for it. An assistant's `refusal` is its text if `content` is null",
    ),
    *honoured(
        CHAT,
        "DeepSeek",
        "messages[-1].prefix",
        {"messages": [HELLO, {"role": "assistant", "content": "x", "prefix": True}]},
        "`true` on a last assistant message",
        "the answer continues it, and holds only what is new. With `reasoning_content` it "
        "continues inside `<think>`",
    ),
    *honoured(
        CHAT,
        "DeepSeek",
        "messages[].reasoning_content",
        {
            "messages": [
                HELLO,
                {"role": "assistant", "content": "", "reasoning_content": "x", "prefix": True},
            ]
        },
        "",
        "the model's chat template says which turns' reasoning it shows; V3's, R1's and V3.1's "
        "show none (see below)",
    ),
    *honoured(CHAT, ALL, "max_completion_tokens", 2, "", "the same as `max_tokens`"),
    *honoured(
        CHAT,
        ALL,
        "tools",
        [{"type": "function", "function": {"name": "g"}}],
        "up to 128 functions and custom tools; names of any 1 to 256 characters",
        "shown to the model as `tokenizer/tool_calls.py` describes; `strict: true` binds every "
        "call's arguments to its schema. To the model a custom tool is a function with the one "
        "argument `input`; a `format` of syntax `regex` is enforced. Other characters of a name "
        "than letters, digits, `_.-` are `_` in the prompt",
    ),
    *honoured(
        CHAT,
        ALL,
        "tool_choice",
        "none",
        "`none`, `auto`, `required`, one named tool, `allowed_tools`",
        "`required` and a name are enforced by a grammar, arguments included. Of `allowed_tools` "
        "the model is shown no others",
    ),
    *honoured(
        CHAT, ALL, "parallel_tool_calls", False, "", "`false`: the answer ends after its first call"
    ),
    *honoured(
        CHAT,
        "DeepSeek",
        "thinking",
        {"type": "enabled"},
        "true, false, or an object whose `type` is `enabled` or `disabled`",
        "whether to reason first, where the chat template has a switch for it (V3.1's has); "
        "elsewhere accepted and named in the reply",
    ),
    *honoured(
        CHAT,
        EXTENDED,
        "chat_template_kwargs",
        {"thinking": True},
        "",
        "its `thinking` or "
        "`enable_thinking`, before `thinking`; other members are named in the reply",
    ),
    *honoured(CHAT, "SGLang", "reasoning", {"enabled": True}, "", "as `thinking`"),
    *honoured(
        CHAT, ALL, "reasoning_effort", "high", "", "as `thinking`: `none` and `minimal` are off"
    ),
    *honoured(
        CHAT,
        ALL,
        "logprobs",
        True,
        "",
        "of the model's own distribution, before temperature and filters",
    ),
    *honoured(
        CHAT,
        ALL,
        "top_logprobs",
        2,
        "up to 20",
        "with `logprobs`; 0 without it asks for nothing",
    ),
    *honoured(
        COMPLETIONS,
        ALL,
        "prompt",
        "other",
        "a text, texts, ids, lists of ids",
        "a text gets a begin-of-sentence token and its special tokens' names are plain text; ids "
        "are taken as they are",
    ),
    *honoured(
        COMPLETIONS,
        "llama.cpp",
        "parse_special",
        True,
        "",
        "names of special tokens in the prompt become these tokens, as the tokenizer spells them "
        "or as a keyboard does (`<|User|>`); without it the header `x-rorqual-notes` tells of a "
        "prompt that has some. `/tokenize` has it too",
    ),
    *honoured(
        COMPLETIONS, "vLLM", "add_special_tokens", False, "", "`false`: no begin-of-sentence token"
    ),
    *honoured(
        COMPLETIONS,
        "OpenAI, DeepSeek",
        "suffix",
        "x",
        "text",
        "`<fim_begin>prompt<fim_hole>suffix<fim_end>`; not with `echo`. Empty: none",
    ),
    *honoured(
        COMPLETIONS,
        ALL,
        "echo",
        True,
        "",
        "the prompt before the answer; with `logprobs` its tokens too (not the begin-of-sentence "
        "that was added)",
    ),
    *honoured(
        COMPLETIONS,
        ALL,
        "logprobs",
        2,
        "0..20",
        "`{tokens, token_logprobs, top_logprobs, text_offset}`; a token that is part of a "
        "character shows as `bytes:\\xf0`",
    ),
)
