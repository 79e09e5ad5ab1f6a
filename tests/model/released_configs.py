"""`config.json` of released checkpoints of the family, key by key and value by value as published.

Kept as differences: V2-Lite to V2, R1 and others to V3, the re-uploads to their originals.
"""

from __future__ import annotations

from typing import Any


def _auto_map(name: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_deepseek.{name}Config",
        "AutoModel": f"modeling_deepseek.{name}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{name}ForCausalLM",
    }


def _without(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": _auto_map("DeepseekV2"), "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 12288,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax",
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 3,
    "topk_method": "group_limited_greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "topk_group": 1, "topk_method": "greedy", "transformers_version": "4.33.1",
}  # fmt: skip
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": _auto_map("DeepseekV3"), "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
R1 = V3 | {"aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True}
V31 = V3 | {
    "quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"},
    "transformers_version": "4.44.2",
}
MOONLIGHT = _without(V3, "quantization_config") | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585,
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264,
    "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "seq_aux": True, "topk_group": 1,
    "transformers_version": "4.48.3", "vocab_size": 163840,
}  # fmt: skip
KIMI_K2 = V3 | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163586,
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "model_type": "kimi_k2",
    "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1,
    "transformers_version": "4.48.3", "vocab_size": 163840,
}  # fmt: skip
# What unsloth adds to its re-uploads in BF16.
UNSLOTH = {
    "unsloth_fixed": True, "unsloth_version": "2025.3.18", "_attn_implementation_autoset": True,
    "pad_token_id": 2, "transformers_version": "4.51.0",
}  # fmt: skip

RELEASED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2": V2,
    "DeepSeek-V2.5": V2,
    "DeepSeek-V2-Lite": V2_LITE,
    "DeepSeek-V3": V3,
    "DeepSeek-V3-0324": V3,
    "DeepSeek-R1": R1,
    "DeepSeek-V3.1": V31,
    "Moonlight-16B-A3B": MOONLIGHT,
    "Kimi-K2-Instruct": KIMI_K2,
    "unsloth/DeepSeek-V3-bf16": _without(V3, "quantization_config") | UNSLOTH,
    "unsloth/DeepSeek-R1-BF16": _without(R1, "quantization_config") | UNSLOTH,
}
