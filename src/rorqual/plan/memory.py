"""Memory of a model at work, by part: weights, cache, activations, workspace.

Weights and cache are exact. Activations and workspace are those of our engine's prefill, the larger
of its steps: one step of `step_tokens` tokens, expanded attention (report §2.1.1) over the longest
context, a block of queries at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.plan.sizes import memory_bytes

QUERY_BLOCK = 64  # queries whose scores exist at once (ops/attention)
KV_FORMATS = ("float32", "bf16", "fp8", "q8", "q8_0", "q4_0")


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: float
    cache: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations + self.workspace

    def as_dict(self) -> dict[str, float]:
        return {
            "weights": self.weights,
            "cache": self.cache,
            "activations": self.activations,
            "workspace": self.workspace,
            "total": self.total,
        }


def cache_bytes_per_token(config: ModelConfig, kv: str) -> float:
    """Bytes a token leaves in the cache, all layers (the MTP layer's not counted).

    fp8 and q8 are our engine's (the rotary key in bfloat16; a float32 scale a token, a float16 one
    for 32 values); q8_0 and q4_0 are llama.cpp's blocks of 32 over all 576 values.
    """
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    by_format = {
        "float32": 4 * (rank + rope),
        "bf16": 2 * (rank + rope),
        "fp8": rank + 4 + 2 * rope,
        "q8": rank + 2 * -(-rank // 32) + 2 * rope,
        "q8_0": (rank + rope) * 34 / 32,
        "q4_0": (rank + rope) * 18 / 32,
    }
    return config.num_hidden_layers * by_format[kv]


def check_kv(name: str) -> str:
    """UsageError for an unknown format of the cache."""
    if name not in KV_FORMATS:
        raise UsageError(f"unknown format of the cache {name!r}", expected=", ".join(KV_FORMATS))
    return name


def memory_of(
    config: ModelConfig,
    *,
    weights: str,
    kv: str,
    context: int,
    batch: int,
    step_tokens: int,
) -> Memory:
    """`batch` streams of `context` tokens each; see the module for what is counted."""
    itemsize = 4 if weights == "float32" else 2  # what is computed with
    step = min(step_tokens, context * batch)
    return Memory(
        weights=memory_bytes(config, weights),
        cache=batch * context * cache_bytes_per_token(config, kv),
        activations=step * activation_width(config) * itemsize,
        workspace=workspace_bytes(config, context, batch, itemsize),
    )


def activation_width(config: ModelConfig) -> int:
    """Values a token holds at the widest point of a layer, the residual stream beside it."""
    heads, dim = config.num_attention_heads, config.hidden_size
    query = heads * config.qk_head_dim + (config.q_lora_rank or 0)
    attention = query + config.latent_dim + heads * config.v_head_dim
    dense = 3 * config.intermediate_size if config.first_k_dense_replace else 0
    routed = config.num_experts_per_tok * (3 * config.moe_intermediate_size + 2 * dim)
    shared = 3 * (config.n_shared_experts or 0) * config.moe_intermediate_size
    return 2 * dim + max(attention, dense, routed + shared)


def workspace_bytes(config: ModelConfig, context: int, batch: int, itemsize: int) -> float:
    """Keys and values of one stream expanded in one layer, scores of a block, logits."""
    heads = config.num_attention_heads
    expanded = context * heads * (config.qk_head_dim + config.v_head_dim) * itemsize
    scores = 2 * heads * QUERY_BLOCK * context * 4  # before and after the softmax
    return expanded + scores + batch * config.vocab_size * 4
