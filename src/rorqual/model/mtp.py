"""Multi-token prediction: one more block a depth, which predicts one token further ahead (report
§2.2).

h'_i = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})]: `eh_proj` takes the embedding half first, as
the released weights have it (the report prints the halves the other way round). Embedding and head
are the main model's.

Where packed documents are isolated, a position exists at depth k only if tokens i and i + k lie in
one document (`documents_at`): as key, as query and as target. Without that rule the last state of
one document would be the first key of the next.
"""

# B batch, T tokens, S >= T + depth tokens of a sample, D hidden size

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.step import Step


class SharedHead(nn.Module):
    """Holds the norm before the shared output head; the head itself is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MtpModule(Block):
    """A block beside `enorm`, `hnorm`, `eh_proj` and `shared_head.norm`; lives at
    layers.{num_hidden_layers + k}.

    forward(h_BTD, embedding_BTD, step) -> h_BTD after shared_head.norm. `h` is the
    hidden state after the previous depth's last norm (the main model's `model.norm` for the first),
    `embedding` that of the token one further.
    """

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__(config, layer_id)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def forward(self, h_BTD: Tensor, embedding_BTD: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        if step.training is not None:
            dtype = self.compute_dtype
            halves = (
                self.enorm.trained(embedding_BTD, step.training, dtype),
                self.hnorm.trained(h_BTD, step.training, dtype),
            )
            x_BTD = self.eh_proj(torch.cat(halves, dim=-1)).float()
            return self.shared_head.norm.trained(super().forward(x_BTD, step), step.training)
        joined = torch.cat([self.enorm(embedding_BTD), self.hnorm(h_BTD)], dim=-1)
        return self.shared_head.norm(super().forward(self.eh_proj(joined), step))


def documents_at(depth: int, documents_BS: Tensor, num_positions: int) -> Tensor:
    """(B, T): the document of each position at `depth`, or 0 where it does not exist there.

    `documents_BS` numbers the documents of the tokens from 1, and is 0 where there is none
    (padding). Depth 0 is the main model.
    """
    here_BT = documents_BS[:, :num_positions]
    further_BT = documents_BS[:, depth : num_positions + depth]
    return here_BT * (here_BT == further_BT)
