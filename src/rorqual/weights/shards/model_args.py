"""The demo's configuration: `ModelArgs` of DeepSeek-V3's inference/model.py, read and written.

Source: inference/model.py and inference/configs/*.json of github.com/deepseek-ai/DeepSeek-V3. What
that class cannot say is constant in its code: rms_norm_eps 1e-6, gates normalised for sigmoid
scores only, a head of its own, and YaRN whenever max_seq_len exceeds original_seq_len (as it does
by default).
"""

from __future__ import annotations

import difflib
from typing import Any

from rorqual.errors import ConfigError
from rorqual.model import ModelConfig, YarnScaling

MODEL_ARGS = "model_args.json"

# ModelArgs' fields and defaults. `dtype` and `scale_fmt` speak of the files, not of the model.
DEFAULTS: dict[str, Any] = {
    "max_batch_size": 8,
    "max_seq_len": 4096 * 4,
    "dtype": "bf16",
    "scale_fmt": None,
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}
SAME_NAMES = """
    vocab_size n_routed_experts n_shared_experts kv_lora_rank qk_nope_head_dim qk_rope_head_dim
    v_head_dim rope_theta
""".split()
OTHER_NAMES = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
}


def is_model_args(table: dict[str, Any]) -> bool:
    """The demo's own field names, and no Hugging Face ones."""
    return {"dim", "n_layers"} <= set(table) and "hidden_size" not in table


def config_from_model_args(table: dict[str, Any], where: object = None) -> ModelConfig:
    """The shape that the demo's JSON describes; ConfigError names a key it does not know."""
    unknown = sorted(set(table) - set(DEFAULTS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], DEFAULTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown keys {', '.join(unknown)}{hint}",
            where=where,
            expected="the fields of the demo's ModelArgs",
        )
    args = DEFAULTS | table
    for name in ("max_seq_len", "original_seq_len", "rope_factor", "mscale"):
        if isinstance(args[name], bool) or not isinstance(args[name], (int, float)):
            raise ConfigError(f"{name} is not a number", where=where, found=args[name])
    is_v3, original = args["score_func"] == "sigmoid", args["original_seq_len"]
    has_yarn = args["max_seq_len"] > original
    fields = {name: args[name] for name in SAME_NAMES}
    fields |= {ours: args[theirs] for theirs, ours in OTHER_NAMES.items()}
    greedy = "group_limited_greedy" if args["n_expert_groups"] != 1 else "greedy"
    fields |= {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "q_lora_rank": args["q_lora_rank"] or None,
        "topk_method": "noaux_tc" if is_v3 else greedy,
        "norm_topk_prob": is_v3,
        "max_position_embeddings": (
            int(original * args["rope_factor"]) if has_yarn else args["max_seq_len"]
        ),
    }
    if has_yarn:
        fields["rope_scaling"] = {
            "type": "yarn",
            "factor": args["rope_factor"],
            "original_max_position_embeddings": original,
            "beta_fast": args["beta_fast"],
            "beta_slow": args["beta_slow"],
            "mscale": args["mscale"],
            "mscale_all_dim": args["mscale"],
        }
    return ModelConfig.from_hf(fields, where)


def model_args(config: ModelConfig, dtype: str, *, is_ue8m0: bool = False) -> dict[str, Any]:
    """The demo's JSON for a shape; `dtype` is "bf16" or "fp8"."""
    args: dict[str, Any] = {
        theirs: getattr(config, ours)
        for theirs, ours in (OTHER_NAMES | dict(zip(SAME_NAMES, SAME_NAMES, strict=True))).items()
    }
    args["n_shared_experts"] = config.n_shared_experts or 0
    args["q_lora_rank"] = config.q_lora_rank or 0
    yarn = config.rope_scaling
    if yarn is not None:
        args |= {
            "original_seq_len": yarn.original_max_position_embeddings,
            "rope_factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale_all_dim,
        }
    else:  # the demo has YaRN on beyond original_seq_len
        length = config.max_position_embeddings
        args |= {"max_seq_len": length, "original_seq_len": length}
    ordered = {name: args[name] for name in DEFAULTS if name in args}
    ordered["dtype"] = dtype
    if is_ue8m0:
        ordered["scale_fmt"] = "ue8m0"
    return ordered


def unsaid(config: ModelConfig) -> list[str]:
    """What of a shape the demo's code computes otherwise, because ModelArgs has no field for it."""
    is_v3, yarn = config.scoring_func == "sigmoid", config.rope_scaling
    found = {
        "num_nextn_predict_layers": config.num_nextn_predict_layers > 0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps != 1e-6,
        "norm_topk_prob": config.norm_topk_prob != is_v3,
        "rope_scaling.mscale": isinstance(yarn, YarnScaling) and yarn.mscale != yarn.mscale_all_dim,
        # The demo gives its gate a bias for that one width only.
        "hidden_size other than 7168 with a router bias": is_v3 and config.hidden_size != 7168,
    }
    return [name for name, is_other in found.items() if is_other]
