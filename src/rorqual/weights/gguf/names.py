"""The tensors of a `deepseek2` GGUF file and the checkpoint tensors that they are made of.

Source: llama.cpp's conversion/deepseek.py, src/models/deepseek2.cpp and gguf's constants. Experts
of a layer are stacked into one tensor. `kv_b_proj` is one tensor in files up to April 2025
(`attn_kv_b`); since then its key half is transposed a head (`attn_k_b`) and its value half apart
(`attn_v_b`), as absorbed attention takes them. An MTP layer is a block after the last, with
`nextn.*` beside the usual names; its copies of embedding and head are left out, being the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from rorqual.model import ModelConfig
from rorqual.weights.names import StoredTensor, tensors_of
from rorqual.weights.planned import PlannedTensor, Role

ARCHITECTURE = "deepseek2"

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def gguf_name(name: str) -> str:
    """The file's name of a checkpoint tensor; experts have the name of their stack."""
    if name in _TOP:
        return _TOP[name]
    layer = _LAYER.fullmatch(name)
    assert layer is not None, f"{name} is no tensor of a checkpoint"
    expert = _EXPERT.fullmatch(layer[2])
    rest = f"ffn_{expert[2]}_exps.weight" if expert else _IN_BLOCK[layer[2]]
    return f"blk.{layer[1]}.{rest}"


def gguf_tensors(
    config: ModelConfig,
    dtype_of: Callable[[str, tuple[int, ...]], str] = lambda name, shape: "F32",
    *,
    is_split: bool = True,
    has_copies: bool = False,
) -> Iterator[PlannedTensor]:
    """The tensors of a file of this shape, in the model's order, with a type by name and shape.

    `is_split` is the newer form of `kv_b_proj`; `has_copies` adds the MTP layers' embedding and
    head. A tied head is left out.
    """

    for name, shape, sources, role in _places(config, is_split, has_copies):
        yield PlannedTensor(name, dtype_of(name, shape), shape, sources, role)


Place = tuple[str, tuple[int, ...], tuple[StoredTensor, ...], Role]


@lru_cache(maxsize=8)
def _places(config: ModelConfig, is_split: bool, has_copies: bool) -> tuple[Place, ...]:
    """Name, shape, what it is made of, and how."""
    return tuple(_each_place(config, is_split, has_copies))


def _each_place(config: ModelConfig, is_split: bool, has_copies: bool) -> Iterator[Place]:
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    stacks: dict[str, list[StoredTensor]] = {}
    for tensor in tensors_of(config):
        name = gguf_name(tensor.name)
        if tensor.kind == "copy" and not (has_copies and ".nextn." in name):
            continue
        if name.endswith("_exps.weight"):
            stack = stacks.setdefault(name, [])
            stack.append(tensor)
            if len(stack) == config.n_routed_experts:
                yield name, (len(stack), *tensor.shape), tuple(stacks.pop(name)), "stack"
        elif is_split and name.endswith("attn_kv_b.weight"):
            k_name, v_name = half_names(name)
            yield k_name, (heads, latent, config.qk_nope_head_dim), (tensor,), "k_b"
            yield v_name, (heads, config.v_head_dim, latent), (tensor,), "v_b"
        else:
            yield name, tensor.shape, (tensor,), "whole"


def half_names(kv_b_name: str) -> tuple[str, str]:
    """`attn_k_b` and `attn_v_b` for an `attn_kv_b`."""
    return kv_b_name.replace("attn_kv_b", "attn_k_b"), kv_b_name.replace("attn_kv_b", "attn_v_b")
