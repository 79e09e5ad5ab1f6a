"""Which keys of somebody's `config.json` change what the model computes.

transformers, unsloth, vLLM, mlx and others leave hundreds of keys there, so an unknown one is no
fault in itself. Three kinds are refused: a near spelling of a key that we read (the writer meant
it, and its value would be lost), a key of `MATHEMATICS` with a value that we do not compute, and
another architecture. Whatever else is unknown is accepted; who loads the weights names it once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rorqual.errors import ConfigError

# difflib's ratio: "n_routed_expert" has 0.97 to the key it was meant for, "num_layers" 0.74 to
# its nearest one.
NEAR_SPELLING = 0.88
OTHER_SOFTWARE = "transformers, vLLM, SGLang or llama.cpp may run this model; Rorqual does not"

# Known, and without effect on what is computed: they are not even named.
INERT_KEYS = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype
    eos_token_id ep_size head_dim id2label label2id model_type
    num_key_value_heads output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type qk_head_dim quantization_config return_dict
    seq_aux torch_dtype transformers_version unpadded_vocab_size use_cache
    aux_loss_alpha attention_dropout rope_parameters
    tf_legacy_loss use_bfloat16 num_local_experts num_experts num_mtp_layers
    """.split()
)

_OFF: tuple[object, ...] = (None, False)
# Keys that change the mathematics in some model, with the values, beside null and false, that
# leave V3's as it is. Lists and tables are neutral when empty.
_SWITCHES = """
    attention_bias mlp_bias bias use_bias qkv_bias use_qkv_bias attention_qkv_bias
    attention_out_bias attention_output_bias o_proj_bias out_proj_bias add_bias_linear add_qkv_bias
    lm_head_bias moe_gate_bias router_bias use_expert_bias
    sliding_window sliding_window_size sliding_window_pattern use_sliding_window window_size
    attention_window_size attention_chunk_size full_attention_interval global_attn_every_n_layers
    attn_sink attention_sinks add_swa_attention_sink_bias add_full_attention_sink_bias
    sparse_attention sparse_attention_config linear_attn_config linear_num_value_heads
    attn_logit_softcapping final_logit_softcapping router_logit_softcapping attn_logit_soft_cap
    final_logit_soft_cap logits_soft_cap logit_softcap output_logit_softcapping attn_soft_cap
    query_pre_attn_scalar attention_multiplier attention_scale softmax_scale scale_depth
    dim_model_base mup_denominator scale_attn_by_inverse_layer_idx use_mup
    qk_norm use_qk_norm qk_layernorm use_qk_layernorm qk_norm_type attn_output_gate
    use_post_norm use_sandwich_norm use_parallel_residual parallel_attn
    apply_residual_connection_post_layernorm mla_use_nope mla_scale_q_lora mla_scale_kv_lora
    swiglu_limit swiglu_alpha activation_limit clip_qkv
    alibi use_alibi use_mrope mrope_section no_rope_layers no_rope_layer_interval
    nope_layer_interval
    rope_local_base_freq swa_rope_theta rope_freqs use_dynamic_ntk use_logn_attn
    mlp_only_layers use_shared_expert_gate shared_expert_gate zero_expert_num zero_expert_type
    n_hash_layers num_hash_layers hc_mult compress_ratios o_groups o_lora_rank residual_in_fp32
    is_encoder_decoder add_cross_attention hidden_size_per_layer_input laurel_rank altup_num_inputs
    """.split()
MATHEMATICS: dict[str, tuple[object, ...]] = {key: _OFF for key in _SWITCHES} | {
    "hidden_act": (None, "silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "activation_function": (None, "silu", "swish"),
    "moe_layer_freq": (None, 1),
    "moe_layer_interval": (None, 1),
    "decoder_sparse_step": (None, 1),
    "rope_interleave": (None, True),
    "use_mla": (None, True),
    "use_rope": (None, True),
    "use_rmsnorm": (None, True),
    "position_embedding_type": (None, "rope", "rotary"),
    "partial_rotary_factor": (None, 1),
    "rotary_percent": (None, 1),
    "rotary_pct": (None, 1),
    "rope_ratio": (None, 1),
    "scale_emb": (None, 1),
    "embedding_multiplier": (None, 1),
    "embedding_scale": (None, 1),
    "residual_multiplier": (None, 1),
    "residual_scale": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "lm_head_multiplier": (None, 1),
    "key_multiplier": (None, 1),
}
MATHEMATICS_PREFIXES = ("index_", "indexer_", "dsa_", "engram_", "mup_", "ssm_", "mamba_")
LAYER_LISTS = ("layer_types", "mlp_layer_types")
WHOLE_ATTENTION = ("full_attention", "attention", "global")
ROPE_MATHEMATICS: dict[str, tuple[object, ...]] = {
    "truncate": (None, True),
    "partial_rotary_factor": (None, 1),
    "short_factor": _OFF,
    "long_factor": _OFF,
    "short_mscale": _OFF,
    "long_mscale": _OFF,
    "low_freq_factor": _OFF,
    "high_freq_factor": _OFF,
    "mrope_section": _OFF,
    "mrope_interleaved": _OFF,
    "alpha": _OFF,
    "extrapolation_factor": (None, 1),
}

# By architecture or model type: what the model is called.
_OTHERS = {
    "Qwen2ForCausalLM": "Qwen2, as in R1-Distill-Qwen",
    "LlamaForCausalLM": "Llama, as in R1-Distill-Llama",
    "Qwen3ForCausalLM": "Qwen3, as in R1-0528-Qwen3",
    "DeepseekForCausalLM": "DeepSeek-MoE, without latent attention",
    "DeepseekV32ForCausalLM": "DeepSeek-V3.2, with sparse attention",
    "DeepseekV4ForCausalLM": "DeepSeek-V4",
    "DeepseekVLV2ForCausalLM": "DeepSeek-VL2, with images",
    "KimiLinearForCausalLM": "Kimi-Linear",
    "KimiK25ForConditionalGeneration": "Kimi-K2.5, with images",
    "KimiVLForConditionalGeneration": "Kimi-VL, with images",
    "LongcatFlashForCausalLM": "LongCat-Flash",
    "Glm4MoeLiteForCausalLM": "GLM-4 MoE Lite",
    "GlmMoeDsaForCausalLM": "GLM with sparse attention",
}
_OTHER_TYPES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "deepseek_vl_v2": "DeepseekVLV2ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "kimi_vl": "KimiVLForConditionalGeneration",
    "longcat_flash": "LongcatFlashForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}


def refuse_misspelt(
    table: Mapping[str, Any], read: Iterable[str], where: object, prefix: str = ""
) -> None:
    """ConfigError for an unknown key that is nearly one of `read`, the keys that we do read."""
    wanted = set(read)
    for key in sorted(set(table) - wanted - INERT_KEYS - set(MATHEMATICS) - set(ROPE_MATHEMATICS)):
        near = difflib.get_close_matches(key.lower(), sorted(wanted), n=1, cutoff=NEAR_SPELLING)
        if near:
            raise ConfigError(
                f"unknown key {prefix + key!r}; did you mean {prefix + near[0]!r}?",
                where=where,
                found=table[key],
                fix="correct the spelling, or remove the key",
            )


def refuse_other_mathematics(
    table: Mapping[str, Any],
    where: object,
    rules: Mapping[str, tuple[object, ...]] = MATHEMATICS,
    prefix: str = "",
) -> None:
    """ConfigError for a key that makes another model of it, unless its value is neutral."""
    for key, value in table.items():
        neutral = rules.get(key)
        if neutral is None and key.startswith(MATHEMATICS_PREFIXES):
            neutral = _OFF
        if neutral is None or value in neutral or value in ([], {}):
            continue
        if key.startswith("sliding_window") and table.get("use_sliding_window", True) is False:
            continue  # Qwen's configs keep a width that the switch beside it turns off
        raise ConfigError(
            f"{prefix}{key} is not supported with this value",
            where=where,
            found=value,
            expected=" or ".join(json.dumps(one) for one in neutral),
            fix=OTHER_SOFTWARE,
        )


def refuse_other_layers(table: Mapping[str, Any], num_dense: int, where: object) -> None:
    """ConfigError for lists of layers that are not V3's, the first `num_dense` of them dense."""
    for key in LAYER_LISTS:
        if not isinstance(table.get(key) or [], list):
            raise ConfigError(
                f"{key} is not a list", where=where, found=table[key], fix="remove the key"
            )
    layers = table.get("layer_types") or []
    strange = [kind for kind in layers if kind not in WHOLE_ATTENTION]
    if strange:
        raise ConfigError(
            "layer_types has layers that do not attend to the whole text",
            where=where,
            found=strange[0],
            expected='null, or "full_attention" for each layer',
            fix=OTHER_SOFTWARE,
        )
    kinds = table.get("mlp_layer_types") or []
    num_dense = min(num_dense, len(kinds))
    if kinds and kinds != ["dense"] * num_dense + ["sparse"] * (len(kinds) - num_dense):
        raise ConfigError(
            "mlp_layer_types and first_k_dense_replace contradict each other",
            where=where,
            found=f"{kinds[:8]}, first_k_dense_replace {num_dense}",
            expected='"dense" for that many layers, then "sparse"',
            fix=OTHER_SOFTWARE,
        )


def other_model(architectures: list[str], model_type: object) -> str | None:
    """What a model of another architecture is called, where it is known."""
    named = [*architectures, _OTHER_TYPES.get(str(model_type), "")]
    return next((_OTHERS[name] for name in named if name in _OTHERS), None)
