"""Memory of a model at work, by part: weights, cache, activations, workspace.

Weights and cache are exact. Activations and workspace are those of prefill, the larger of an
engine's steps: one step of `step_tokens` tokens, expanded attention (report §2.1.1) over the
longest context. The scores of our engine on a CPU exist for a block of queries at a time; on a GPU
no kernel writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.model import ModelConfig
from rorqual.ops.attention import CAUSAL_BLOCK
from rorqual.plan.hardware import Hardware
from rorqual.plan.sizes import memory_bytes
from rorqual.plan.wish import Wish


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


def memory_of(wish: Wish, hardware: Hardware) -> Memory:
    """See the module for what is counted."""
    step = min(wish.step_tokens(hardware), wish.context * wish.batch)
    return Memory(
        weights=memory_bytes(wish.config, wish.runs_as, with_mtp=wish.has_mtp),
        cache=wish.cache_bytes,
        activations=step * activation_width(wish.config) * wish.itemsize,
        workspace=workspace_bytes(wish, step, is_cpu=hardware.is_cpu),
    )


def fits(wish: Wish, hardware: Hardware) -> bool:
    return memory_of(wish, hardware).total <= hardware.usable_bytes


def activation_width(config: ModelConfig) -> int:
    """Values a token holds at the widest point of a layer, the residual stream beside it."""
    heads, dim = config.num_attention_heads, config.hidden_size
    query = heads * config.qk_head_dim + (config.q_lora_rank or 0)
    attention = query + config.latent_dim + heads * config.v_head_dim
    dense = 3 * config.intermediate_size if config.first_k_dense_replace else 0
    routed = config.num_experts_per_tok * (3 * config.moe_intermediate_size + 2 * dim)
    shared = 3 * (config.n_shared_experts or 0) * config.moe_intermediate_size
    return 2 * dim + max(attention, dense, routed + shared)


def workspace_bytes(wish: Wish, step: int, *, is_cpu: bool) -> float:
    """Keys and values of one stream expanded in one layer, scores of a block, logits.

    The up-projection's output has keys and values; the keys are copied beside their rotary part.
    """
    config, heads = wish.config, wish.config.num_attention_heads
    width = config.qk_nope_head_dim + config.v_head_dim + config.qk_head_dim
    expanded = wish.context * heads * width * wish.itemsize
    queries = min(step, CAUSAL_BLOCK) if is_cpu else 0
    scores = heads * queries * wish.context * (wish.itemsize + 4)  # and their softmax
    return expanded + scores + wish.batch * (1 + wish.num_drafts) * config.vocab_size * 4
