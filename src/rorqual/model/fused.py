"""A model that runs whole, in one call of the C++ kernels, over a paged cache.

From token ids to hidden states and to the logits of some rows: what `Body.forward`, an MTP module's
and the head's compute, with the same packed matrices; the modules stay its twin. There is such a
call where every matrix of the blocks is packed. The queries of a step are few and its operators
many: most of a step's time would go by between them.
"""

# M tokens of a step, N rows whose logits are wanted, D hidden size, V vocabulary, R rotary width

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from ctypes import Array
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.layers import FeedForward, RMSNorm
from rorqual.model.mla import LATENT_NORM_EPS
from rorqual.model.moe import MoE
from rorqual.model.mtp import MtpModule
from rorqual.model.rope import AngleTable
from rorqual.model.stored import (
    StoredEmbedding,
    StoredExperts,
    StoredHalves,
    StoredLinear,
    StoredStack,
)
from rorqual.ops.native import KINDS
from rorqual.ops.native.layers import NativeLayers
from rorqual.ops.native.structs import Cache, Ends, Layer, Shape, Stack
from rorqual.ops.native.structs import Step as NativeStep
from rorqual.ops.packed import pack


class PagedTokens(NamedTuple):
    """Tokens of some spans, one after the other, whose past is in a paged cache.

    `spans` has six numbers each: of tokens, the first one's slot, the first slot that they see, the
    first one's rotary position, where its blocks begin in `tables`, and whether they attend
    absorbed. Positions lie below `num_positions`. `caches` are the layers from 0 on, MTP modules
    last, in blocks of `block_tokens` slots. All arrays are int64.
    """

    ids: array[int]
    spans: array[int]
    tables: array[int]
    num_positions: int
    block_tokens: int
    caches: Array[Cache]


class Wanted(NamedTuple):
    """Of these tokens, in ascending order, the likeliest of the first `num_ids` ids is wanted, and
    perhaps their logits.
    """

    rows_N: Sequence[int]
    num_ids: int
    needs_logits: bool


class Found(NamedTuple):
    """Hidden states behind the last norm, float32; of the rows that were wanted the likeliest ids,
    -1 where a logit is not finite, and float32 logits. None: the head is not packed, or nobody
    asked.
    """

    h_MD: Tensor
    likeliest_N: Sequence[int] | None = None
    logits_NV: Tensor | None = None


class Shared(NamedTuple):
    """What the main layers and MTP modules have in common."""

    embedding: nn.Module
    head: nn.Module
    angles: AngleTable


class FusedModel:
    """The main layers and the MTP modules, each with what stands before and behind them."""

    def __init__(self, main: FusedLayers, modules: Sequence[FusedLayers | None]) -> None:
        self._calls = [main, *modules]

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model has weights of its own, and is fused again by whoever chooses its
        kernels.
        """

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def call(self, depth: int) -> FusedLayers | None:
        """The call of the main layers (0), or of an MTP depth; None: its modules run one by one."""
        return self._calls[depth]


class FusedLayers:
    """Some blocks as one call, with the embedding before them, in an MTP module (which is then the
    only block) its norms and `eh_proj`, and a norm and the head behind them. Their weights must not
    change or move meanwhile.
    """

    def __init__(self, blocks: Sequence[Block], norm: RMSNorm, shared: Shared) -> None:
        config = blocks[0].self_attn.config
        self._first = blocks[0].self_attn.layer_id
        ids = [block.self_attn.layer_id for block in blocks]
        assert ids == list(range(self._first, self._first + len(ids))), "they follow each other"
        self._kept: list[Tensor] = []
        self._embedding, self._angles = shared.embedding, shared.angles
        ends = Ends(last_norm=self._floats(norm.weight))
        if _is_packed(shared.embedding):
            ends.embedding = self._stack(shared.embedding)
        if _is_packed(shared.head):
            ends.head = self._stack(shared.head)
        self._num_logits: int = ends.head.rows
        if isinstance(blocks[0], MtpModule):
            ends.joint = self._stack(blocks[0].eh_proj)
            ends.embedding_norm = self._floats(blocks[0].enorm.weight)
            ends.state_norm = self._floats(blocks[0].hnorm.weight)
        self._has_embedding, self._width = bool(ends.embedding.num), config.hidden_size
        layers = [self._layer(block) for block in blocks]
        self._layers = NativeLayers(_shape(config), ends, layers, self._kept)

    def __call__(
        self, tokens: PagedTokens, states_MD: Tensor | None = None, wanted: Wanted | None = None
    ) -> Found:
        """`states_MD`: for an MTP module, the hidden states of the depth before. The latents go
        into the cache.
        """
        ids, spans, tables, num_positions, block_tokens, caches = tokens
        num = len(ids)
        cos, sin = self._angles.up_to(num_positions)
        step = NativeStep(
            0, num, len(spans) // 6, block_tokens, num_positions, 0, tables.buffer_info()[0],
            spans.buffer_info()[0], cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip
        if self._has_embedding:
            h_MD = torch.empty(num, self._width)
            step.ids = ids.buffer_info()[0]
        else:
            h_MD = self._embedding(torch.tensor(ids)).float().contiguous()
        step.hidden = h_MD.data_ptr()
        if states_MD is not None:
            assert states_MD.dtype is torch.float32, "states are float32"
            assert states_MD.is_contiguous(), "states lie side by side"
            assert states_MD.numel() == num * self._width, "a state a token"
            step.states = states_MD.data_ptr()
        likeliest_N = logits_NV = None
        if wanted is not None and wanted.rows_N and self._num_logits:
            rows_N = array("q", wanted.rows_N)
            likeliest_N = array("q", rows_N)
            step.num_rows, step.num_ids = len(rows_N), wanted.num_ids
            step.rows, step.likeliest = rows_N.buffer_info()[0], likeliest_N.buffer_info()[0]
            if wanted.needs_logits:
                logits_NV = torch.empty(len(rows_N), self._num_logits)
                step.logits = logits_NV.data_ptr()
        self._layers.run(step, caches[self._first])
        return Found(h_MD, likeliest_N, logits_NV)

    @property
    def has_head(self) -> bool:
        return self._num_logits > 0

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
        stack: StoredStack = getattr(part, "stack", part)
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


def fused(layers: Sequence[nn.Module], norm: RMSNorm, shared: Shared) -> FusedModel | None:
    """Calls of a model's layers, where all that its main ones hold is packed."""
    modules = [layer for layer in layers if isinstance(layer, MtpModule)]
    main = [layer for layer in layers if isinstance(layer, Block) and layer not in modules]
    if not main or not all(map(_can_fuse, main)):
        return None
    return FusedModel(
        FusedLayers(main, norm, shared),
        [
            FusedLayers([module], module.shared_head.norm, shared) if _can_fuse(module) else None
            for module in modules
        ],
    )


def _is_packed(part: object) -> bool:
    if not isinstance(part, StoredEmbedding | StoredLinear):
        return False
    return part.stack.packed_EP is not None


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
    if isinstance(block, MtpModule):
        parts.append(block.eh_proj)
    stacks = [module for module in block.modules() if isinstance(module, StoredStack)]
    floats = [module.weight for module in block.modules() if isinstance(module, RMSNorm)]
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
