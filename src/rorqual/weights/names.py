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
from typing import Literal, get_args

import torch
from torch import Tensor

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.ops.block_fp8 import num_blocks

Format = Literal["float32", "bfloat16", "fp8"]
FORMATS: tuple[Format, ...] = get_args(Format)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCALE_SUFFIX = "_scale_inv"
# Buffers that old checkpoints carry although they follow from the configuration.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

Kind = Literal["plain", "projection", "bias", "copy", "scale"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. `parameter[index]` of the model is its place.

    kind: "projection" may be FP8, with a "scale" beside it; "bias" is float32 always; "copy"
    repeats `parameter` in the file and may be absent; all else is "plain".
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
        return self.name + SCALE_SUFFIX

    def scale_shape(self, block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
        return num_blocks(self.shape[0], block[0]), num_blocks(self.shape[1], block[1])

    def dtype_in(self, format: Format) -> torch.dtype:
        """What the tensor is stored as: FP8 is for `self_attn` and `mlp` projections."""
        if self.kind in ("bias", "scale") or format == "float32":
            return torch.float32
        if format == "fp8" and self.kind == "projection":
            return torch.float8_e4m3fn
        return torch.bfloat16

    def num_bytes_in(self, format: Format) -> int:
        return torch.Size(self.shape).numel() * self.dtype_in(format).itemsize


@dataclass
class _Layer:
    """Collects the tensors of one layer, in the order of a forward pass."""

    config: ModelConfig
    prefix: str
    tensors: list[StoredTensor] = field(default_factory=list)

    def add(self, name: str, shape: tuple[int, ...], kind: Kind = "plain") -> None:
        full = f"{self.prefix}{name}"
        self.tensors.append(StoredTensor(full, shape, full, kind=kind))

    def add_attention(self) -> None:
        c, heads = self.config, self.config.num_attention_heads
        if c.q_lora_rank is None:
            self.add(
                "self_attn.q_proj.weight", (heads * c.qk_head_dim, c.hidden_size), "projection"
            )
        else:
            self.add("self_attn.q_a_proj.weight", (c.q_lora_rank, c.hidden_size), "projection")
            self.add("self_attn.q_a_layernorm.weight", (c.q_lora_rank,))
            self.add(
                "self_attn.q_b_proj.weight", (heads * c.qk_head_dim, c.q_lora_rank), "projection"
            )
        kv_width = heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.add("self_attn.kv_a_proj_with_mqa.weight", (c.latent_dim, c.hidden_size), "projection")
        self.add("self_attn.kv_a_layernorm.weight", (c.kv_lora_rank,))
        self.add("self_attn.kv_b_proj.weight", (kv_width, c.kv_lora_rank), "projection")
        self.add("self_attn.o_proj.weight", (c.hidden_size, heads * c.v_head_dim), "projection")

    def add_feed_forward(self, name: str, inner: int) -> None:
        dim = self.config.hidden_size
        self.add(f"{name}.gate_proj.weight", (inner, dim), "projection")
        self.add(f"{name}.up_proj.weight", (inner, dim), "projection")
        self.add(f"{name}.down_proj.weight", (dim, inner), "projection")

    def add_experts(self) -> None:
        c = self.config
        dim, inner, num = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
        self.add("mlp.gate.weight", (num, dim))
        if c.has_correction_bias:
            self.add("mlp.gate.e_score_correction_bias", (num,), "bias")
        stacked = f"{self.prefix}mlp.experts."
        rows = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}
        for expert_id in range(num):
            for part, place in rows.items():
                self.tensors.append(
                    StoredTensor(
                        f"{stacked}{expert_id}.{part}.weight",
                        (inner, dim),
                        f"{stacked}gate_up_proj",
                        (expert_id, place),
                        "projection",
                    )
                )
            self.tensors.append(
                StoredTensor(
                    f"{stacked}{expert_id}.down_proj.weight",
                    (dim, inner),
                    f"{stacked}down_proj",
                    (expert_id,),
                    "projection",
                )
            )
        if c.n_shared_experts:
            self.add_feed_forward("mlp.shared_experts", inner * c.n_shared_experts)

    def add_copy(self, name: str, parameter: str) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.tensors.append(StoredTensor(f"{self.prefix}{name}", shape, parameter, kind="copy"))


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


def tensors_of(config: ModelConfig) -> Iterator[StoredTensor]:
    """Every tensor a checkpoint of this shape may hold but the scales, in the model's order.

    Those of kind "copy" may be absent: the MTP layers' embedding and head, and a tied `lm_head`.
    """
    shape = (config.vocab_size, config.hidden_size)
    yield StoredTensor(EMBEDDING, shape, EMBEDDING)
    for layer_id in range(config.num_layers_with_mtp):
        yield from _layer_tensors(config, layer_id)
    yield StoredTensor("model.norm.weight", (config.hidden_size,), "model.norm.weight")
    if config.tie_word_embeddings:
        yield StoredTensor(HEAD, shape, EMBEDDING, kind="copy")
    else:
        yield StoredTensor(HEAD, shape, HEAD)


def stored_tensors(
    config: ModelConfig, format: Format, *, repeat_mtp_embedding: bool = True
) -> list[StoredTensor]:
    """What a checkpoint that we write holds, FP8 scales included, in the order of the file.

    A tied head is left out; the MTP copies of embedding and head are there on request.
    """
    if format not in FORMATS:
        raise UsageError(f"no such format {format!r}", expected=", ".join(FORMATS))
    stored = []
    for tensor in tensors_of(config):
        is_absent = tensor.name == HEAD if config.tie_word_embeddings else False
        if is_absent or (tensor.kind == "copy" and not repeat_mtp_embedding):
            continue
        stored.append(tensor)
        if format == "fp8" and tensor.kind == "projection":
            stored.append(
                StoredTensor(
                    tensor.scale_name,
                    tensor.scale_shape(),
                    tensor.parameter,
                    tensor.index,
                    "scale",
                )
            )
    return stored
