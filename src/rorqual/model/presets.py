"""Named shapes: `tiny` ships here, `small` trains on one GPU, `mid` is for benchmarks on a CPU, the
others are DeepSeek's own.
"""

from __future__ import annotations

from pathlib import Path

from rorqual.bundled import BUNDLED
from rorqual.errors import ConfigError, UsageError
from rorqual.model.config import ModelConfig, YarnScaling

PREFIX = "preset:"

_V2_YARN = YarnScaling(
    factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=3072,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_nextn_predict_layers=1,
        max_position_embeddings=512,
        initializer_range=0.04,
        tie_word_embeddings=True,
    ),
    "small": ModelConfig(
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=2304,
        moe_intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_nextn_predict_layers=1,
        max_position_embeddings=4096,
    ),
    "mid": ModelConfig(  # of 1,765M parameters a token meets 363M: beyond any processor's caches
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=0,
        max_position_embeddings=16384,
        initializer_range=0.02,
    ),
    "16b": ModelConfig(  # DeepSeek-V2-Lite
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=_V2_YARN,
        max_position_embeddings=163840,
        initializer_range=0.02,
    ),
    "236b": ModelConfig(  # DeepSeek-V2
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=3,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=_V2_YARN,
        max_position_embeddings=163840,
        initializer_range=0.02,
    ),
    "671b": ModelConfig(  # DeepSeek-V3 (report §4.2)
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=1,
        max_position_embeddings=163840,
        rope_scaling=YarnScaling(
            factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
        ),
    ),
}


def preset(name: str) -> ModelConfig:
    """The named shape, as NAME or `preset:NAME`; ConfigError lists the names if there is none."""
    try:
        return PRESETS[name.removeprefix(PREFIX)]
    except KeyError:
        raise ConfigError(f"there is no preset {name!r}", expected=", ".join(PRESETS)) from None


def named_preset(target: str) -> ModelConfig | None:
    """The shape that a command's argument names; None if it names a checkpoint.

    `preset:NAME` is always a preset. A bare NAME is one unless it is also the bundled model's name.
    UsageError where a file or folder has the same name: neither may win in silence.
    """
    if target.startswith(PREFIX):
        return preset(target)
    if target not in PRESETS or target == BUNDLED:
        return None
    if Path(target).exists():
        raise UsageError(
            "is a preset, and a file or folder here has that name too",
            where=target,
            fix=f"write {PREFIX}{target} for the preset, ./{target} for what lies here",
        )
    return PRESETS[target]


def no_such_model(target: str) -> UsageError:
    """The error for an argument that is neither a preset nor anything on the disk."""
    return UsageError(
        "neither a checkpoint nor a preset",
        where=target,
        expected=f"a checkpoint folder, a GGUF file, the bundled model {BUNDLED!r}, or a preset: "
        + ", ".join(f"{PREFIX}{name}" for name in PRESETS),
        fix="check the path; models are not downloaded",
    )
