"""Multi-head latent attention: all heads' keys and values from one small cached vector a token
(report §2.1.1).

Two equal computations stand side by side. *Expanded* builds keys and values per head from the
latent: best for many queries (training, prefill). *Absorbed* folds W_uk into the query and W_uv
into the output, so that attention is multi-query over the cached latent itself: best for few
queries against a long cache (decode).
"""

# B batch, T queries, S cached tokens, D hidden size, H heads, C latent (kv_lora_rank),
# R rotary width, L = C + R, N qk_nope_head_dim, V v_head_dim; M = B * T tokens of a step

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.model.config import ModelConfig
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.rope import rotate
from rorqual.model.served import Served
from rorqual.model.step import Part, Step
from rorqual.ops.kernels import TrainingKernels
from rorqual.ops.training.attention import Widths

# Choice: as in DeepSeek's published modelling code and transformers, the norms of the latents keep
# this epsilon whatever `rms_norm_eps` says (V3 has 1e-6 in both places).
LATENT_NORM_EPS = 1e-6


class LatentUp(Linear):
    """W_uk and W_uv of all heads, in one matrix (H * (N + V), C): between the latent and heads.

    forward(c_kv (..., C)) -> keys (..., H, N) and values (..., H, V).
    """

    def __init__(self, config: ModelConfig) -> None:
        widths = config.qk_nope_head_dim, config.v_head_dim
        super().__init__(config.kv_lora_rank, config.num_attention_heads * sum(widths))
        self.num_heads, self.widths = config.num_attention_heads, widths

    def forward(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        kv = super().forward(c_kv).unflatten(-1, (self.num_heads, -1))
        keys, values = kv.split(self.widths, dim=-1)
        return keys, values

    def trained(self, c_kv: Tensor) -> Tensor:
        """Keys and values side by side for each head, (..., H * (N + V))."""
        return super().forward(c_kv)

    def absorb(self, q_nope_MHN: Tensor) -> Tensor:
        """Queries in the latent space, (M, H, C)."""
        return self.kernels.head_linear(q_nope_MHN, self._by_head()[0].transpose(1, 2))

    def unabsorb(self, out_MHC: Tensor) -> Tensor:
        """Sums of latents as sums of values, (M, H, V)."""
        return self.kernels.head_linear(out_MHC, self._by_head()[1])

    def _by_head(self) -> Sequence[Tensor]:
        """W_uk (H, N, C) and W_uv (H, V, C)."""
        return self._cast(self.weight).unflatten(0, (self.num_heads, -1)).split(self.widths, dim=1)


class MLA(Served):
    """forward(x_BTD, step) -> (B, T, D). Caches only (normed latent, rotated shared key).

    Its kernels are those of its attention, chosen by the dtype of the norm, which latents have.
    """

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.config, self.layer_id = config, layer_id
        self.num_heads = config.num_attention_heads
        q_width = self.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, q_width)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = LatentUp(config)
        self.o_proj = Linear(self.num_heads * config.v_head_dim, config.hidden_size)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        if step.training is not None:
            return self._trained(x_BTD, step, step.training)
        q_nope_BTHN, q_rope_BTHR = self._queries(x_BTD, step)
        latent_BTL = self._latent(x_BTD, step)
        parts = step.cache.append(self.layer_id, latent_BTL)
        out_MHV = self._by_parts(q_nope_BTHN.flatten(0, 1), q_rope_BTHR.flatten(0, 1), parts)
        out_BTHV = out_MHV.unflatten(0, x_BTD.shape[:2])
        return self.o_proj(out_BTHV.flatten(2))

    def _trained(self, x_BTD: Tensor, step: Step, kernels: TrainingKernels) -> Tensor:
        config, x_MD = self.config, x_BTD.flatten(0, 1)
        if config.q_lora_rank is None:
            q = self.q_proj(x_MD)
        else:
            c_q = self.q_a_proj(x_MD)
            q = self.q_b_proj(self.q_a_layernorm.trained(c_q, kernels, c_q.dtype))
        c_kv, rope = self.kv_a_proj_with_mqa(x_MD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        kv = self.kv_b_proj.trained(self.kv_a_layernorm.trained(c_kv, kernels, c_kv.dtype))
        widths = Widths(
            x_BTD.shape[0], x_BTD.shape[1], self.num_heads,
            config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
        )  # fmt: skip
        out = kernels.latent_attention(
            q, kv, rope, step.cos, step.sin, step.documents_BT, widths, config.softmax_scale
        )
        return self.o_proj(out).view(*x_BTD.shape[:2], -1)

    def storage(self) -> tuple[str, torch.device]:
        return self.kv_a_layernorm.storage()

    def _by_parts(self, q_nope_MHN: Tensor, q_rope_MHR: Tensor, parts: Sequence[Part]) -> Tensor:
        sizes = [part.num_tokens for part in parts]
        outs = []
        for part, q_nope, q_rope in zip(
            parts, q_nope_MHN.split(sizes), q_rope_MHR.split(sizes), strict=True
        ):
            attend = self._absorbed if part.use_absorbed else self._expanded
            shape = part.latent_BSL.shape[0], -1
            q_nope_BTHN, q_rope_BTHR = q_nope.unflatten(0, shape), q_rope.unflatten(0, shape)
            out_BTHV = attend(q_nope_BTHN, q_rope_BTHR, part.latent_BSL, part.visible)
            outs.append(out_BTHV.flatten(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _queries(self, x_BTD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTHC = q.unflatten(-1, (self.num_heads, config.qk_head_dim))
        q_nope, q_rope = q_BTHC.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, step.cos[:, :, None], step.sin[:, :, None])

    def _latent(self, x_BTD: Tensor, step: Step) -> Tensor:
        """[RMSNorm(c_kv), RoPE(k_rope)] (B, T, C + R): the whole cache of a token in this layer."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(x_BTD).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        normed = self.kv_a_layernorm(c_kv).to(c_kv.dtype)
        return torch.cat([normed, rotate(k_rope, step.cos, step.sin)], dim=-1)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, visible: Tensor | None
    ) -> Tensor:
        config = self.config
        c_kv_BSC, k_rope_BSR = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        k_nope, v_BSHV = self.kv_b_proj(c_kv_BSC)
        k_rope = k_rope_BSR[:, :, None].expand(-1, -1, self.num_heads, -1)
        q_BHTC = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
        k_BHSC = torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2)
        out_BHTV = self.kernels.attention(
            q_BHTC, k_BHSC, v_BSHV.transpose(1, 2), visible, config.softmax_scale
        )
        return out_BHTV.transpose(1, 2)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, visible: Tensor | None
    ) -> Tensor:
        config = self.config
        q_latent = self.kv_b_proj.absorb(q_nope.flatten(0, 1))
        q_BHTL = torch.cat([q_latent.view(*q_rope.shape[:3], -1), q_rope], dim=-1).transpose(1, 2)
        k_B1SL = latent[:, None]  # one key for all heads
        out_BHTC = self.kernels.attention(
            q_BHTL, k_B1SL, k_B1SL[..., : config.kv_lora_rank], visible, config.softmax_scale
        )
        out_MHV = self.kv_b_proj.unabsorb(out_BHTC.transpose(1, 2).flatten(0, 1))
        return out_MHV.view(*q_nope.shape[:3], -1)
