"""One transformer block: attention and a feed-forward part, each behind norm and residual."""

# B batch, T tokens, D hidden size

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.config import ModelConfig
from rorqual.model.layers import FeedForward, RMSNorm
from rorqual.model.mla import MLA
from rorqual.model.moe import MoE
from rorqual.model.step import Step
from rorqual.ops.kernels import TrainingKernels


class Block(nn.Module):
    """forward(x_BTD, step) -> x_BTD. Sparse, but for the dense first layers."""

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer_id)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | FeedForward
        if config.is_moe_layer(layer_id):
            self.mlp = MoE(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, step: Step) -> Tensor:
        if step.training is not None:
            return self._trained(x_BTD, step, step.training)
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), step)
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            return x_BTD + self.mlp(normed, step)
        return x_BTD + self.mlp(normed)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of its products in a training step."""
        return self.self_attn.o_proj.compute_dtype or torch.float32

    def _trained(self, x_BTD: Tensor, step: Step, kernels: TrainingKernels) -> Tensor:
        normed = self.input_layernorm.trained(x_BTD, kernels, self.compute_dtype)
        more_TD = self.self_attn(normed, step).flatten(0, 1)
        norm = self.post_attention_layernorm
        x_TD, wide_TD, narrow_TD = kernels.add_norm(
            x_BTD.flatten(0, 1), more_TD, norm.weight, norm.eps, self.compute_dtype
        )
        if isinstance(self.mlp, MoE):
            out = self.mlp(wide_TD.view_as(x_BTD), step, narrow_TD=narrow_TD)
        else:
            out = self.mlp.trained(narrow_TD, kernels)
        return x_TD.view_as(x_BTD) + out.view_as(x_BTD)
