"""Blocks that run whole, in one call of the C++ kernels, over a paged cache.

It is what `Block.forward` computes, with the same packed matrices; the modules stay its twin. There
is such a call where every matrix of the blocks is packed. The queries of a step are few and its
operators many: most of a step's time would go by between them.
"""

# M tokens of a step, D hidden size, R rotary width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.layers import FeedForward, RMSNorm
from rorqual.model.mla import LATENT_NORM_EPS
from rorqual.model.moe import MoE
from rorqual.model.step import Paged, Step
from rorqual.model.stored import StoredExperts, StoredHalves, StoredLinear, StoredStack
from rorqual.ops.native import KINDS
from rorqual.ops.native.layers import NativeLayers
from rorqual.ops.native.structs import Layer, Shape, Stack
from rorqual.ops.packed import pack


class FusedBlocks:
    """Some blocks as one call. Their weights must not change or move meanwhile."""

    def __init__(self, blocks: Sequence[Block], config: ModelConfig) -> None:
        self._first = blocks[0].self_attn.layer_id
        ids = [block.self_attn.layer_id for block in blocks]
        assert ids == list(range(self._first, self._first + len(ids))), "they follow each other"
        self._kept: list[Tensor] = []
        layers = [self._layer(block) for block in blocks]
        self._layers = NativeLayers(_shape(config), layers, self._kept)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model has weights of its own, and is fused again by whoever chooses its
        kernels.
        """

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def __call__(self, x_1MD: Tensor, step: Step, paged: Paged, norm: RMSNorm | None) -> Tensor:
        """Hidden states through the blocks, and through a norm; the latents go into the cache."""
        x_MD = x_1MD[0].to(torch.float32, copy=True).contiguous()
        cos_MR, sin_MR = (angle.flatten(0, -2).contiguous() for angle in (step.cos, step.sin))
        last = None if norm is None else (norm.weight, norm.eps)
        places = paged.places_M, paged.spans_N5, paged.tables, paged.block_tokens
        self._layers.run(x_MD, (cos_MR, sin_MR), places, paged.caches[self._first], last)
        return x_MD[None]

    def _layer(self, block: Block) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        halves: Any = attention.kv_b_proj
        layer = Layer(
            input_norm=self._floats(block.input_layernorm.weight),
            latent_norm=self._floats(attention.kv_a_layernorm.weight),
            mlp_norm=self._floats(block.post_attention_layernorm.weight),
            latent_a=self._stack(attention.kv_a_proj_with_mqa),
            keys=self._stack(halves.keys),
            values=self._stack(halves.values),
            output=self._stack(attention.o_proj),
        )
        if attention.config.q_lora_rank is None:
            layer.query_b = self._stack(attention.q_proj)
        else:
            layer.query_norm = self._floats(attention.q_a_layernorm.weight)
            layer.query_a = self._stack(attention.q_a_proj)
            layer.query_b = self._stack(attention.q_b_proj)
        dense: FeedForward | None
        if not isinstance(mlp, MoE):
            dense = mlp
        else:
            dense = mlp.shared_experts
            layer.router = self._router(mlp.gate.weight)
            if attention.config.has_correction_bias:
                layer.router_bias = self._floats(mlp.gate.e_score_correction_bias)
            for part in ("gate", "up", "down"):
                setattr(layer, f"expert_{part}", self._stack(getattr(mlp.experts, part)))
        if dense is not None:
            for part in ("gate", "up", "down"):
                setattr(layer, part, self._stack(getattr(dense, f"{part}_proj")))
        return layer

    def _stack(self, part: Any) -> Stack:
        stack: StoredStack = part if isinstance(part, StoredStack) else part.stack
        assert stack.packed_EP is not None, "it was asked before"
        num, rows, columns = stack.shape
        return Stack(KINDS[stack.kind], num, rows, columns, self._keep(stack.packed_EP))

    def _router(self, weight_ED: Tensor) -> Stack:
        rows, columns = weight_ED.shape
        codes = weight_ED.detach().contiguous().view(torch.uint8).view(1, rows, -1)
        return Stack(KINDS["F32"], 1, rows, columns, self._keep(pack(codes, "F32", columns)))

    def _floats(self, weight: Tensor) -> int:
        return self._keep(weight.detach())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def fused(blocks: Sequence[Block]) -> FusedBlocks | None:
    """One call of these blocks, where all that they hold is packed."""
    if not blocks or not all(_can_fuse(block) for block in blocks):
        return None
    return FusedBlocks(blocks, blocks[0].self_attn.config)


def _can_fuse(block: Block) -> bool:
    attention, mlp = block.self_attn, block.mlp
    parts: list[Any] = [attention.kv_a_proj_with_mqa, attention.o_proj, attention.kv_b_proj]
    if attention.config.q_lora_rank is None:
        parts.append(attention.q_proj)
    else:
        parts += [attention.q_a_proj, attention.q_b_proj]
    if isinstance(mlp, MoE):
        parts.append(mlp.experts)
        mlp_parts = mlp.shared_experts
    else:
        mlp_parts = mlp
    if isinstance(mlp_parts, FeedForward):
        parts += [mlp_parts.gate_proj, mlp_parts.up_proj, mlp_parts.down_proj]
    stacks = [module for module in block.modules() if isinstance(module, StoredStack)]
    floats = [attention.kv_a_layernorm.weight, block.input_layernorm.weight]
    return (
        all(isinstance(part, StoredLinear | StoredHalves | StoredExperts) for part in parts)
        and all(stack.packed_EP is not None for stack in stacks)
        and all(weight.dtype is torch.float32 for weight in floats)
        and attention.config.qk_nope_head_dim % 2 == 0
    )


def _nothing() -> None:
    """What a pickled call of blocks becomes."""


def _shape(config: ModelConfig) -> Shape:
    has_groups = config.topk_method != "greedy" and config.topk_group < config.n_group
    return Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        query_rank=config.q_lora_rank or 0,
        latent_rank=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        nope=config.qk_nope_head_dim,
        value=config.v_head_dim,
        experts=config.n_routed_experts,
        chosen=config.num_experts_per_tok,
        groups=config.n_group if has_groups else 0,
        kept_groups=config.topk_group,
        best_of_group=2 if config.topk_method == "noaux_tc" else 1,
        is_softmax=config.scoring_func == "softmax",
        is_normalised=config.norm_topk_prob,
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        softmax_scale=config.softmax_scale,
        routed_scale=config.routed_scaling_factor,
    )
