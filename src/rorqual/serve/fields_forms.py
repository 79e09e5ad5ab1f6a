"""What else asks for an answer's form, or for what another field asks: a part of the table in
`fields.py`.
"""

from __future__ import annotations

from rorqual.serve.field_row import CHAT, COMPLETIONS, ROUTES, honoured

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
GBNF = 'root ::= "a" | "b"'
FORM = "the same as `response_format`"
FORMS = (
    *honoured(
        ROUTES,
        "OpenAI, vLLM, SGLang, llama.cpp",
        "response_format",
        {"type": "json_object"},
        "`text`, `json_object`, `json_schema`",
        "`schema` may stand beside `type`, as llama.cpp has it. **Extensions**: "
        '`{"type": "regex", "regex": ...}`, `{"type": "choice", "choices": [...]}`, '
        '`{"type": "grammar", "grammar": ...}`. With tools the answer is calls or the JSON',
    ),
    *honoured(
        ROUTES,
        "vLLM",
        "guided_json",
        SCHEMA,
        "a schema, or its JSON as a text",
        f"{FORM} `json_schema`. Two fields that ask for different forms are an error",
    ),
    *honoured(
        ROUTES,
        "vLLM",
        "guided_regex",
        "a+",
        "matched whole, in Rust's syntax",
        f"{FORM} `regex`",
    ),
    *honoured(ROUTES, "vLLM", "guided_choice", ["a", "b"], "", f"{FORM} `choice`"),
    *honoured(
        ROUTES,
        "vLLM",
        "guided_grammar",
        GBNF,
        "GBNF up to 32,768 characters, or llguidance's Lark",
        f"{FORM} `grammar`. GBNF without recursion is exact; where rules recur, a run of "
        "characters takes as many as it can",
    ),
    *honoured(
        ROUTES, "SGLang, llama.cpp", "json_schema", "{}", "", "as `guided_json`; `{}` is any JSON"
    ),
    *honoured(ROUTES, "SGLang", "regex", "a+", "", "as `guided_regex`"),
    *honoured(ROUTES, "SGLang", "ebnf", GBNF, "", "as `guided_grammar`"),
    *honoured(ROUTES, "llama.cpp", "grammar", GBNF, "", "as `guided_grammar`; empty: none"),
    *honoured(
        ROUTES,
        "vLLM",
        "structured_outputs",
        {"regex": "a+"},
        "an object with one of `json`, `regex`, `choice` (`choices`), `grammar`, "
        "`json_object: true`",
        "as the `guided_` fields",
    ),
    *honoured(
        ROUTES,
        "vLLM",
        "allowed_token_ids",
        [5, 6],
        "1 to 10,000 ids",
        "no other tokens come, unless a grammar leaves none of these; the end neither, if it is "
        "not among them",
    ),
    *honoured(
        ROUTES,
        "vLLM",
        "include_stop_str_in_output",
        True,
        "",
        "the stop string that ends the answer is part of it, and so is the token of "
        "`stop_token_ids`",
    ),
    *honoured(ROUTES, "SGLang", "no_stop_trim", True, "", "as `include_stop_str_in_output`"),
    *honoured(
        ROUTES,
        "vLLM",
        "thinking_token_budget",
        5,
        "0..; -1: none",
        "after so many tokens of reasoning comes `</think>`",
    ),
    *honoured(ROUTES, "llama.cpp", "n_predict", 2, "as `max_tokens`", "the same as `max_tokens`"),
    *honoured(ROUTES, "llama.cpp", "n_cmpl", 2, "1..128", "the same as `n`"),
    *honoured(
        ROUTES,
        "llama.cpp",
        "repeat_penalty",
        1.2,
        "above 0",
        "the same as `repetition_penalty`, over the whole prompt and answer",
    ),
    *honoured(
        COMPLETIONS, "llama.cpp", "n_probs", 2, "0..20; 0: nothing is asked", "as `logprobs`"
    ),
    *honoured(
        CHAT,
        "llama.cpp",
        "n_probs",
        2,
        "0..20; 0: nothing is asked",
        "as `logprobs: true` with `top_logprobs`",
    ),
    *honoured(
        CHAT,
        "vLLM, SGLang",
        "continue_final_message",
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "x"},
            ],
            "continue_final_message": True,
        },
        "",
        "as `prefix` on the last message, which must be the assistant's",
    ),
)
