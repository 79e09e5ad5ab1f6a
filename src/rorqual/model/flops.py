"""Parameters, cache bytes and FLOPs of a shape, in closed form: nothing is built (report §2, §4.2).

"Activated" are the parameters that one token meets: of the routed experts only the chosen ones, and
no router biases, which only steer the choice; embedding and head count whole, as in the report's
37B. FLOPs count matrix products alone, two a multiply-add.
"""

# D hidden size, H heads, C kv_lora_rank, R rotary width, E experts, K experts per token

from __future__ import annotations

from dataclasses import dataclass

from rorqual.model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; router biases are in `total` and `mtp`. `head` is 0 where tied."""

    total: int  # the main model, with embedding and head
    activated: int
    embedding: int
    head: int
    mtp: int  # the MTP modules' own
    mtp_activated: int
    num_mtp_layers: int

    @property
    def mtp_repeated(self) -> int:
        """The MTP modules with the embedding and head that checkpoints repeat for each."""
        return self.mtp + self.num_mtp_layers * (self.embedding + (self.head or self.embedding))


def count_parameters(config: ModelConfig) -> ParameterCount:
    """As the report counts them (671B, of which 37B activated), for any shape."""
    dim, num_main = config.hidden_size, config.num_hidden_layers
    embedding = config.vocab_size * dim
    head = 0 if config.tie_word_embeddings else embedding
    # Of a sparse layer, what a token does not meet: experts not chosen, and the bias.
    unused_layer = _unused_expert_parameters(config) + _router_bias(config)
    num_sparse = sum(config.is_moe_layer(i) for i in range(num_main))
    total = embedding + head + dim + sum(_block_parameters(config, i) for i in range(num_main))
    joining = 2 * dim * dim + 3 * dim  # eh_proj; enorm, hnorm, shared_head.norm
    num_mtp = config.num_nextn_predict_layers
    mtp = num_mtp * (_block_parameters(config, num_main) + joining)
    return ParameterCount(
        total=total,
        activated=total - num_sparse * unused_layer,
        embedding=embedding,
        head=head,
        mtp=mtp,
        mtp_activated=mtp - num_mtp * unused_layer,
        num_mtp_layers=num_mtp,
    )


def kv_bytes_per_token(
    config: ModelConfig, bytes_per_value: float = 2, *, with_mtp: bool = False
) -> float:
    """Bytes that a token leaves in the cache: kv_lora_rank + rotary width values a layer (§2.1.1).

    2 bytes a value in bfloat16, 4 in float32, 1 in FP8 (without its scales).
    """
    num_layers = config.num_layers_with_mtp if with_mtp else config.num_hidden_layers
    return num_layers * config.latent_dim * bytes_per_value


def forward_flops_per_token(
    config: ModelConfig,
    context_tokens: float,
    *,
    use_absorbed: bool = False,
    with_mtp: bool = False,
) -> float:
    """FLOPs of one token that sees `context_tokens` keys, itself included, head included.

    `use_absorbed` counts attention over the latent (decode) instead of per-head keys and values.
    With `with_mtp` each MTP module and its pass through the shared head are added.
    """
    count = count_parameters(config)
    num_layers, num_head_passes = config.num_hidden_layers, 1
    matrices = count.activated - count.embedding - count.head - config.hidden_size
    if with_mtp:
        num_layers, num_head_passes = config.num_layers_with_mtp, 1 + count.num_mtp_layers
        matrices += count.mtp_activated - 3 * config.hidden_size * count.num_mtp_layers
    matrices += num_head_passes * count.embedding - num_layers * _block_norms(config)
    if use_absorbed:
        width = config.latent_dim + config.kv_lora_rank
    else:
        width = config.qk_head_dim + config.v_head_dim
    attention = num_layers * config.num_attention_heads * width * context_tokens
    return 2 * (matrices + attention)


def layer_flops_per_token(config: ModelConfig, layer_id: int, context_tokens: float) -> float:
    """One layer's share of `forward_flops_per_token`; of an MTP module without its pass through the
    head.
    """
    matrices = _block_parameters(config, layer_id) - _block_norms(config)
    if config.is_moe_layer(layer_id):
        matrices -= _unused_expert_parameters(config) + _router_bias(config)
    if layer_id >= config.num_hidden_layers:
        matrices += 2 * config.hidden_size**2
    width = config.qk_head_dim + config.v_head_dim
    return 2 * (matrices + config.num_attention_heads * width * context_tokens)


def head_flops_per_token(config: ModelConfig) -> float:
    """One pass through the head."""
    return 2 * config.vocab_size * config.hidden_size


def prompt_flops(config: ModelConfig, num_tokens: int) -> float:
    """FLOPs of a prompt that nothing is known of yet; the head meets its last token alone."""
    head = head_flops_per_token(config)
    each = forward_flops_per_token(config, (num_tokens + 1) / 2)
    return num_tokens * each - (num_tokens - 1) * head


def distinct_experts(config: ModelConfig, num_tokens: int) -> float:
    """Routed experts of a layer that `num_tokens` independent tokens visit, in expectation: of E,
    of which each chooses K, E * (1 - (1 - K/E)^B) where all are equally likely.
    """
    share = config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - (1 - share) ** num_tokens)


def training_flops_per_token(
    config: ModelConfig, sequence_tokens: int, *, with_mtp: bool = True
) -> float:
    """Forward and backward (twice the forward) in causal sequences of `sequence_tokens`."""
    mean_context = (sequence_tokens + 1) / 2
    return 3 * forward_flops_per_token(config, mean_context, with_mtp=with_mtp)


def _block_parameters(config: ModelConfig, layer_id: int) -> int:
    dim = config.hidden_size
    if config.is_moe_layer(layer_id):
        num_experts = config.n_routed_experts + (config.n_shared_experts or 0)
        router = config.n_routed_experts * dim + _router_bias(config)
        feed_forward = router + num_experts * 3 * dim * config.moe_intermediate_size
    else:
        feed_forward = 3 * dim * config.intermediate_size
    return _attention_parameters(config) + feed_forward + 2 * dim


def _attention_parameters(config: ModelConfig) -> int:
    dim, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_width = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = dim * q_width
    else:
        query = config.q_lora_rank * (dim + 1 + q_width)  # down, norm, up
    key_value = dim * config.latent_dim + latent
    key_value += latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + key_value + heads * config.v_head_dim * dim


def _unused_expert_parameters(config: ModelConfig) -> int:
    """The routed experts of a sparse layer that a token does not visit."""
    num_unused = config.n_routed_experts - config.num_experts_per_tok
    return num_unused * 3 * config.hidden_size * config.moe_intermediate_size


def _router_bias(config: ModelConfig) -> int:
    return config.n_routed_experts if config.has_correction_bias else 0


def _block_norms(config: ModelConfig) -> int:
    return 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)
