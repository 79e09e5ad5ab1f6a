"""Tiny configurations that the tests of several files share."""

from __future__ import annotations

import torch

from rorqual.model import DeepseekV3, ModelConfig, YarnScaling, build

BASE = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    num_nextn_predict_layers=1,
    max_position_embeddings=256,
)
YARN = YarnScaling(factor=4, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)

CONFIGS: dict[str, ModelConfig] = {
    "base": BASE,
    "no_q_lora": BASE.with_changes(q_lora_rank=None),
    "groups": BASE.with_changes(n_group=4, topk_group=2),
    "four_of_eight_groups": BASE.with_changes(
        n_routed_experts=16, n_group=8, topk_group=4, num_experts_per_tok=6
    ),
    "no_mtp": BASE.with_changes(num_nextn_predict_layers=0),
    "two_mtp": BASE.with_changes(num_nextn_predict_layers=2),
    "yarn": BASE.with_changes(rope_scaling=YARN),
    "yarn_mscales_differ": BASE.with_changes(
        rope_scaling=YarnScaling(
            factor=40, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.0
        )
    ),
    "yarn_mscale_alone": BASE.with_changes(
        rope_scaling=YarnScaling(factor=40, original_max_position_embeddings=16, mscale=0.7)
    ),
    "another_epsilon": BASE.with_changes(rms_norm_eps=1e-3),
    "tied": BASE.with_changes(tie_word_embeddings=True),
    "two_shared": BASE.with_changes(n_shared_experts=2),
    "all_dense_but_one": BASE.with_changes(first_k_dense_replace=2),
    "not_normalised": BASE.with_changes(norm_topk_prob=False, routed_scaling_factor=1.0),
    "v2_greedy": BASE.with_changes(
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
        q_lora_rank=None,
    ),
    "v2_groups": BASE.with_changes(
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=0,
    ),
}


def lively(config: ModelConfig, seed: int = 0) -> DeepseekV3:
    """A model whose weights are large enough for attention, routing and its bias to matter."""
    model = build(config.with_changes(initializer_range=0.08), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if config.has_correction_bias:
            for router in model.routers():
                bias = router.e_score_correction_bias
                bias.add_(0.05 * torch.randn(bias.shape, generator=generator))
    return model


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=generator)
