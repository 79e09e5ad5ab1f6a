"""One small model for the tests of all rooms: a dense layer, sparse ones and an MTP module.

A test that needs another shape says which with `with_changes`. What is cached here is shared by
all tests of a process: they read it alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from rorqual.model import DeepseekV3, ModelConfig, YarnScaling, build
from rorqual.tokenizer import Tokenizer, train_tokenizer

SMALL = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
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
SPOKEN = SMALL.with_changes(vocab_size=320, num_hidden_layers=2, routed_scaling_factor=1.0)
"""With rows for all ids of `tokenizer()`, and some beyond."""
LITTLE = SPOKEN.with_changes(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_attention_heads=2
)
"""For tests that run many steps."""
YARN = YarnScaling(factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)


def softmax(base: ModelConfig) -> ModelConfig:
    """V2's router, and no MTP module."""
    return base.with_changes(
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
    )


def variants(base: ModelConfig) -> dict[str, ModelConfig]:
    """One thing at a time that a configuration may say otherwise; V2's with no MTP module."""
    mscales = YarnScaling(
        factor=40, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.0
    )
    return {
        "base": base,
        "no_q_lora": base.with_changes(q_lora_rank=None),
        "groups": base.with_changes(n_group=4, topk_group=2),
        "half_of_groups": base.with_changes(
            n_routed_experts=16, n_group=8, topk_group=4, num_experts_per_tok=6
        ),
        "two_mtp": base.with_changes(num_nextn_predict_layers=2),
        "yarn": base.with_changes(rope_scaling=YARN),
        "yarn_mscales_differ": base.with_changes(rope_scaling=mscales),
        "tied": base.with_changes(tie_word_embeddings=True),
        "two_shared": base.with_changes(n_shared_experts=2),
        "all_dense_but_one": base.with_changes(first_k_dense_replace=2),
        "not_normalised": base.with_changes(norm_topk_prob=False, routed_scaling_factor=1.0),
        "v2_greedy": softmax(base).with_changes(q_lora_rank=None, n_shared_experts=2),
        "v2_groups": softmax(base).with_changes(
            topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
        ),
    }


def randomise(module: nn.Module, seed: int, std: float = 0.08) -> None:
    """Weights large enough that attention and routing matter, norms near one, biases that steer.
    By the names of a checkpoint: transformers' models too.
    """
    generator = torch.Generator().manual_seed(seed)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    places = {n: v for n, v in named.items() if n in module.state_dict() or n.endswith("inv_freq")}
    with torch.no_grad():
        for name, value in sorted(places.items()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                value.copy_(1 + 0.1 * noise)
            elif name.endswith("e_score_correction_bias"):
                value.copy_(0.05 * noise)
            elif value.dim() > 1:
                value.copy_(std * noise)


def lively(config: ModelConfig, seed: int = 0) -> DeepseekV3:
    model = build(config).eval()
    randomise(model, seed)
    return model


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((ours - theirs).norm() / theirs.norm())


TEXTS = ("The whale swims in the sea; the sea is deep. One, two, three whales sing.",) * 4


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)
