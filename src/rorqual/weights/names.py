"""The tensors of a checkpoint: their names, shapes and places in our parameters.

Files hold each expert by itself (`mlp.experts.7.gate_proj.weight`), we hold them stacked
(`mlp.experts.gate_up_proj`[7, :I]); a `StoredTensor` is one file entry and where it goes. MTP
layers repeat the embedding and the head in files only. Names and shapes: the released
`model.safetensors.index.json` (DeepSeek-V3 README_WEIGHTS).
"""

# D hidden size, I intermediate size, E experts, V vocabulary

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from rorqual.model import ModelConfig
from rorqual.weights import fp8
from rorqual.weights.fp8 import Kind

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Buffers that old checkpoints carry although they follow from the configuration.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. `parameter[index]` of the model is its place.

    kind: "projection" is FP8 where the checkpoint is (`fp8.py` knows which those are); "bias" is
    float32 always; "copy" repeats `parameter` in the file and may be absent; all else is "plain".
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    index: tuple[int | slice, ...] = ()
    kind: Kind = "plain"

    def part_of(self, parameter: Tensor) -> Tensor:
        """The view of our parameter that this tensor fills."""
        return parameter[self.index] if self.index else parameter

    @property
    def scale_name(self) -> str:
        return fp8.scale_name(self.name)

    def scale_shape(self, block: tuple[int, int] = fp8.BLOCK_PAIR) -> tuple[int, int]:
        return fp8.scale_shape(self.shape, block)


@dataclass
class _Layer:
    """Collects the tensors of one layer, in the order of a forward pass."""

    config: ModelConfig
    prefix: str
    tensors: list[StoredTensor] = field(default_factory=list)

    def add(self, name: str, shape: tuple[int, ...], kind: Kind | None = None) -> None:
        full = f"{self.prefix}{name}"
        self.tensors.append(StoredTensor(full, shape, full, kind=kind or _kind_of(full)))

    def add_attention(self) -> None:
        c, heads = self.config, self.config.num_attention_heads
        if c.q_lora_rank is None:
            self.add("self_attn.q_proj.weight", (heads * c.qk_head_dim, c.hidden_size))
        else:
            self.add("self_attn.q_a_proj.weight", (c.q_lora_rank, c.hidden_size))
            self.add("self_attn.q_a_layernorm.weight", (c.q_lora_rank,))
            self.add("self_attn.q_b_proj.weight", (heads * c.qk_head_dim, c.q_lora_rank))
        kv_width = heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.add("self_attn.kv_a_proj_with_mqa.weight", (c.latent_dim, c.hidden_size))
        self.add("self_attn.kv_a_layernorm.weight", (c.kv_lora_rank,))
        self.add("self_attn.kv_b_proj.weight", (kv_width, c.kv_lora_rank))
        self.add("self_attn.o_proj.weight", (c.hidden_size, heads * c.v_head_dim))

    def add_feed_forward(self, name: str, inner: int) -> None:
        dim = self.config.hidden_size
        self.add(f"{name}.gate_proj.weight", (inner, dim))
        self.add(f"{name}.up_proj.weight", (inner, dim))
        self.add(f"{name}.down_proj.weight", (dim, inner))

    def add_experts(self) -> None:
        c = self.config
        dim, inner, num = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
        self.add("mlp.gate.weight", (num, dim))
        if c.has_correction_bias:
            self.add("mlp.gate.e_score_correction_bias", (num,), "bias")
        both, down = (f"{self.prefix}mlp.experts.{name}_proj" for name in ("gate_up", "down"))
        gate_rows, up_rows = slice(0, inner), slice(inner, 2 * inner)
        for expert_id in range(num):
            self.add_expert(f"{expert_id}.gate_proj", (inner, dim), both, (expert_id, gate_rows))
            self.add_expert(f"{expert_id}.up_proj", (inner, dim), both, (expert_id, up_rows))
            self.add_expert(f"{expert_id}.down_proj", (dim, inner), down, (expert_id,))
        if c.n_shared_experts:
            self.add_feed_forward("mlp.shared_experts", inner * c.n_shared_experts)

    def add_expert(
        self, name: str, shape: tuple[int, int], stack: str, index: tuple[int | slice, ...]
    ) -> None:
        full = f"{self.prefix}mlp.experts.{name}.weight"
        self.tensors.append(StoredTensor(full, shape, stack, index, _kind_of(full)))

    def add_copy(self, name: str, parameter: str) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.tensors.append(StoredTensor(f"{self.prefix}{name}", shape, parameter, kind="copy"))


def _kind_of(name: str) -> Kind:
    return "projection" if fp8.is_projection(name) else "plain"


def layer_prefix(layer_id: int) -> str:
    return f"model.layers.{layer_id}."


def layer_of(name: str) -> int | None:
    """The layer that a tensor's name speaks of."""
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(layer[1]) if layer else None


def _layer_tensors(config: ModelConfig, layer_id: int) -> list[StoredTensor]:
    layer, dim = _Layer(config, layer_prefix(layer_id)), config.hidden_size
    is_mtp = layer_id >= config.num_hidden_layers
    if is_mtp:
        layer.add_copy("embed_tokens.weight", EMBEDDING)
        layer.add("enorm.weight", (dim,))
        layer.add("hnorm.weight", (dim,))
        layer.add("eh_proj.weight", (dim, 2 * dim))
    layer.add("input_layernorm.weight", (dim,))
    layer.add_attention()
    layer.add("post_attention_layernorm.weight", (dim,))
    if config.is_moe_layer(layer_id):
        layer.add_experts()
    else:
        layer.add_feed_forward("mlp", config.intermediate_size)
    if is_mtp:
        layer.add("shared_head.norm.weight", (dim,))
        layer.add_copy("shared_head.head.weight", EMBEDDING if config.tie_word_embeddings else HEAD)
    return layer.tensors


# Of V3 they are 92,000, and a plan asks for them once for each format.
@lru_cache(maxsize=4)
def tensors_of(config: ModelConfig) -> tuple[StoredTensor, ...]:
    """Every tensor a checkpoint of this shape may hold but the scales, in the model's order.

    Those of kind "copy" may be absent: the MTP layers' embedding and head, and a tied `lm_head`.
    """
    return tuple(_each_tensor(config))


def _each_tensor(config: ModelConfig) -> Iterator[StoredTensor]:
    shape = (config.vocab_size, config.hidden_size)
    yield StoredTensor(EMBEDDING, shape, EMBEDDING)
    for layer_id in range(config.num_layers_with_mtp):
        yield from _layer_tensors(config, layer_id)
    yield StoredTensor("model.norm.weight", (config.hidden_size,), "model.norm.weight")
    if config.tie_word_embeddings:
        yield StoredTensor(HEAD, shape, EMBEDDING, kind="copy")
    else:
        yield StoredTensor(HEAD, shape, HEAD)


def written_tensors(
    config: ModelConfig, *, repeat_mtp_embedding: bool = True
) -> list[StoredTensor]:
    """Those of a checkpoint that we write, but the scales: a tied head is left out, the MTP copies
    of embedding and head are there on request.
    """
    absent = {HEAD} if config.tie_word_embeddings else set()
    return [
        tensor
        for tensor in tensors_of(config)
        if tensor.name not in absent and (repeat_mtp_embedding or tensor.kind != "copy")
    ]
