"""Every request field that OpenAI, DeepSeek, vLLM, SGLang, llama.cpp or LiteLLM documents, and what
becomes of it here: the one table that requests, docs/api.md and the tests are held to.

*honoured*: it does what its server says. *ignored*: accepted with any value, for it cannot change
the answer's meaning. *noted*: the same, and the reply names it, for somebody may rely on it.
*refused*: it would change the answer and cannot be honoured here, so that it is an error by name,
unless its value says that nothing is asked. `null` is such a value everywhere.

Honoured fields are declared in the schemas; the others are known from here alone. A field that is
in neither place is unknown: named in the reply, or with `--strict-fields` refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from rorqual.serve.field_row import (
    CALLS,
    CHAT,
    COMPLETIONS,
    FUNCTIONS,
    MESSAGES,
    PARTS,
    STRUCTURED,
    TOOLS,
    FieldRow,
    refused,
    without_effect,
)
from rorqual.serve.fields_apis import APIS
from rorqual.serve.fields_elsewhere import ELSEWHERE
from rorqual.serve.fields_forms import FORMS
from rorqual.serve.fields_honoured import HONOURED

IGNORED = (
    *without_effect("OpenAI", "user metadata store service_tier prediction safety_identifier"),
    *without_effect("OpenAI", "prompt_cache_key prompt_cache_options prompt_cache_retention"),
    *without_effect(
        "vLLM",
        "request_id session_id priority spaces_between_special_tokens truncation_side "
        "length_penalty media_io_kwargs mm_processor_kwargs return_mm_kwargs stream_interval "
        "routed_experts_prompt_start return_token_offsets guided_decoding_backend",
    ),
    *without_effect(
        "SGLang",
        "rid extra_key custom_labels ngram_corpus_id routed_experts_start_len images_config "
        "max_dynamic_patch min_dynamic_patch use_audio_in_video bootstrap_host bootstrap_port "
        "bootstrap_room routed_dp_rank data_parallel_rank disagg_prefill_dp_rank",
    ),
    *without_effect(
        "llama.cpp",
        "cache_prompt id_slot n_keep n_cache_reuse min_keep dynatemp_exponent "
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold "
        "mirostat_tau mirostat_eta sse_ping_interval",
    ),
    *without_effect(
        "LiteLLM",
        "timeout num_retries max_retries fallbacks context_window_fallback_dict drop_params "
        "allowed_openai_params extra_headers caching cache tags litellm_metadata "
        "litellm_session_id litellm_call_id custom_llm_provider api_base base_url api_version "
        "api_key deployment_id model_list input_cost_per_token output_cost_per_token "
        "hf_model_name",
    ),
    *without_effect("OpenAI", "id annotations", places=MESSAGES),
    *without_effect("LiteLLM", "provider_specific_fields thinking_blocks", places=MESSAGES),
    *without_effect("LiteLLM", "cache_control", places=(MESSAGES, PARTS, TOOLS, FUNCTIONS)),
    *without_effect("vLLM", "reasoning", places=MESSAGES),
    *without_effect("lm-eval", "type", places=MESSAGES),
    *without_effect("OpenAI", "status phase", places=MESSAGES),
    *without_effect("OpenAI", "prompt_cache_breakpoint annotations logprobs", places=PARTS),
    *without_effect("vLLM, SGLang", "defer_loading", places=(TOOLS, FUNCTIONS)),
    *without_effect("OpenAI", "index", places=CALLS),
    *without_effect("vLLM", "disable_any_whitespace", places=STRUCTURED),
    *without_effect("LiteLLM", "provider_specific_fields cache_control", places=CALLS),
)
NOTED = (
    *without_effect("OpenAI", "verbosity", "medium", is_noted=True),
    *without_effect("vLLM", "return_token_ids return_prompt_text", False, is_noted=True),
    *without_effect(
        "vLLM",
        "cache_salt kv_transfer_params ec_transfer_params vllm_xargs watermarking",
        is_noted=True,
    ),
    *without_effect(
        "SGLang",
        "return_hidden_states return_routed_experts return_cached_tokens_details "
        "return_prompt_token_ids return_meta_info",
        False,
        is_noted=True,
    ),
    *without_effect("SGLang", "stream_reasoning", True, is_noted=True),
    *without_effect("SGLang", "session_params task", is_noted=True),
    *without_effect(
        "llama.cpp",
        "return_tokens timings_per_token return_progress reasoning_control",
        False,
        is_noted=True,
    ),
    *without_effect("llama.cpp", "response_fields", [], is_noted=True),
    *without_effect("llama.cpp", "repeat_last_n", 64, is_noted=True),
    *without_effect("LiteLLM", "guardrails", [], is_noted=True),
)
REFUSED = (
    *refused("OpenAI", "modalities", ["audio"], ["text"], note="answers are text"),
    *refused("OpenAI", "audio", {"voice": "alloy"}, note="answers are text"),
    *refused("OpenAI", "functions", [{"name": "f"}], [], note="use tools"),
    *refused("OpenAI", "function_call", {"name": "f"}, "none", "auto", note="use tool_choice"),
    *refused("OpenAI", "web_search_options", {}, note="no search"),
    *refused("OpenAI", "moderation", {"model": "m"}, note="no moderation"),
    *refused("OpenAI", "prompt", "x", note="use messages", places=CHAT),
    *refused("OpenAI", "suffix", "x", "", note="use /v1/completions", places=CHAT),
    *refused("vLLM", "echo", True, False, note="use /v1/completions", places=CHAT),
    *refused("OpenAI", "messages", [], note="use prompt", places=COMPLETIONS),
    *refused("OpenAI", "tools", [{}], [], note="use the chat route", places=COMPLETIONS),
    *refused("OpenAI", "tool_choice", "required", "none", "auto", places=COMPLETIONS),
    *refused("vLLM", "use_beam_search", True, False),
    *refused("vLLM", "truncate_prompt_tokens", 10),
    *refused("vLLM", "prompt_logprobs", 1, note="echo and logprobs of /v1/completions"),
    *refused("vLLM", "logprob_token_ids", [1]),
    *refused("vLLM", "return_tokens_as_token_ids", True, False),
    *refused("vLLM", "bad_words", ["x"], [], note="use logit_bias"),
    *refused("vLLM", "include_reasoning", False, True),
    *refused("vLLM", "repetition_detection", {"max_pattern_size": 3}),
    *refused("OpenAI", "best_of", 4, 1, note="every answer is returned", places=COMPLETIONS),
    *refused("vLLM", "prompt_embeds", "eA==", places=COMPLETIONS),
    *refused("vLLM", "documents", [{"text": "x"}], [], places=CHAT),
    *refused("vLLM", "chat_template", "{{ messages }}", places=CHAT),
    *refused("vLLM", "add_special_tokens", True, False, places=CHAT),
    *refused(
        "vLLM",
        "add_generation_prompt",
        False,
        True,
        note="continue_final_message",
        places=CHAT,
    ),
    *refused("SGLang", "stop_regex", "a", []),
    *refused("SGLang", "lora_path", "x"),
    *refused("SGLang", "custom_params", {"a": 1}, {}),
    *refused("SGLang", "custom_logit_processor", "x"),
    *refused("SGLang", "input_ids", [1], note="use /v1/completions", places=CHAT),
    *refused("SGLang", "separate_reasoning", False, True, places=CHAT),
    *refused("llama.cpp", "thinking_forced_open", True, False, places=CHAT),
    *refused("vLLM", "guided_whitespace_pattern", " ?", note="use whitespace"),
    *refused("llama.cpp", "n_indent", 2, 0),
    *refused("llama.cpp", "post_sampling_probs", True, False),
    *refused("llama.cpp", "typical_p", 0.9, 1),
    *refused("llama.cpp", "top_n_sigma", 1.5, -1, 0),
    *refused("llama.cpp", "dynatemp_range", 0.5, 0),
    *refused("llama.cpp", "dry_multiplier", 0.8, 0),
    *refused("llama.cpp", "xtc_probability", 0.5, 0),
    *refused("llama.cpp", "mirostat", 2, 0),
    *refused("llama.cpp", "t_max_predict_ms", 100, 0),
    *refused("llama.cpp", "samplers", ["top_k"]),
    *refused("llama.cpp", "lora", [{"id": 0, "scale": 1}], []),
    *refused("llama.cpp", "reasoning_format", "none", "auto", "deepseek", places=CHAT),
    *refused("llama.cpp", "parse_tool_calls", False, True, places=CHAT),
    *refused("LiteLLM", "initial_prompt_value", "x", ""),
    *refused("LiteLLM", "final_prompt_value", "x", ""),
    *refused("LiteLLM", "roles", {"user": {}}, {}),
    *refused("OpenAI", "audio", {"id": "x"}, note="answers are text", places=MESSAGES),
    *refused("OpenAI", "function_call", {"name": "f"}, note="use tool_calls", places=MESSAGES),
    *refused("vLLM", "structural_tag", "{}", note="use tools", places=STRUCTURED),
    *refused("vLLM", "whitespace_pattern", " ?", places=STRUCTURED),
    *refused(
        "vLLM",
        "disable_additional_properties",
        True,
        False,
        note="say it in the schema",
        places=STRUCTURED,
    ),
)
ROWS: tuple[FieldRow, ...] = (*HONOURED, *FORMS, *IGNORED, *NOTED, *REFUSED, *APIS, *ELSEWHERE)


def _by_place() -> Mapping[str, Mapping[str, FieldRow]]:
    found: dict[str, dict[str, FieldRow]] = {}
    for row in ROWS:
        assert row.name not in found.setdefault(row.place, {}), f"{row.place} has {row.name} twice"
        found[row.place][row.name] = row
    return found


BY_PLACE = _by_place()
