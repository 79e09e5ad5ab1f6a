"""One transformer block: attention and a feed-forward part, each behind norm and residual."""

# B batch, T tokens, D hidden size

from __future__ import annotations

from torch import Tensor, nn

from rorqual.model.config import ModelConfig
from rorqual.model.layers import FeedForward, RMSNorm
from rorqual.model.mla import MLA
from rorqual.model.moe import MoE
from rorqual.model.step import Step


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
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), step)
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            return x_BTD + self.mlp(normed, step)
        return x_BTD + self.mlp(normed)
