"""The router: which experts a token visits, and how their outputs are weighed (report §2.1.2).

Published implementations disagree in three places; ours are choices, each with a test: groups that
were not kept get -inf (a masked zero could win when every biased score is negative), scores are
float32 whatever the model's dtype, and the normaliser adds 1e-20 so that a row of underflowed
scores stays finite.
"""

# T tokens, D hidden size, E routed experts, G groups, K experts per token

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rorqual.model.config import ModelConfig
from rorqual.model.kept import KeepsBuffers
from rorqual.model.served import Served
from rorqual.ops.kernels import TrainingKernels, storage_of


class Routing(NamedTuple):
    """weights_TK float32, experts_TK int64, scores_TE float32 (before bias and normalisation)."""

    weights_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor


class Router(Served, KeepsBuffers):
    """Chooses K of E experts for each token inside at most `topk_group` of G groups.

    forward(x_TD) -> Routing(weights_TK float32, experts_TK int64, scores_TE float32)

    `e_score_correction_bias` (E,), float32, steers the choice but never the weights: it is moved by
    `train.router_bias.update_bias`, not by the gradient (auxiliary-loss-free balance). V2's form
    has softmax scores, the best score of a group as the group's, and no bias (arXiv 2405.04434
    §2.2.2).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.has_correction_bias:
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor, training: TrainingKernels | None = None) -> Routing:
        logits_TE = self.kernels.linear_float32(x_TD, self.weight)
        if training is not None:
            return self._trained(logits_TE, training)
        return self.choice(logits_TE)

    def choice(self, logits_TE: Tensor) -> Routing:
        config = self.config
        if config.scoring_func == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            chosen_TE = scores_TE.detach() + self.e_score_correction_bias
        else:
            scores_TE = logits_TE.softmax(dim=-1)
            chosen_TE = scores_TE.detach()
        if config.topk_method != "greedy" and config.topk_group < config.n_group:
            chosen_TE = self._keep_best_groups(chosen_TE)  # §2.1.2: node-limited routing
        experts_TK = chosen_TE.topk(config.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(-1, experts_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights_TK * config.routed_scaling_factor, experts_TK, scores_TE)

    def _trained(self, logits_TE: Tensor, training: TrainingKernels) -> Routing:
        config = self.config
        groups = []
        if config.topk_method != "greedy" and config.topk_group < config.n_group:
            groups = [config.n_group, config.topk_group, self._num_best()]
        bias = self.e_score_correction_bias if config.scoring_func == "sigmoid" else None
        return Routing(
            *training.route(
                logits_TE, bias, config.num_experts_per_tok, groups,
                config.scoring_func != "sigmoid", config.norm_topk_prob,
                config.routed_scaling_factor,
            )
        )  # fmt: skip

    def storage(self) -> tuple[str, torch.device]:
        return storage_of(self.weight), self.weight.device

    def _keep_best_groups(self, chosen_TE: Tensor) -> Tensor:
        config = self.config
        grouped_TGM = chosen_TE.unflatten(-1, (config.n_group, -1))
        group_scores_TG = grouped_TGM.topk(self._num_best(), dim=-1).values.sum(-1)
        kept = group_scores_TG.topk(config.topk_group, dim=-1).indices
        dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(-1, kept, False)
        return grouped_TGM.masked_fill(dropped_TG[..., None], float("-inf")).flatten(-2)

    def _num_best(self) -> int:
        """§2.1.2: the two highest affinities in a group are summed; V2 takes the highest alone."""
        config = self.config
        size = config.n_routed_experts // config.n_group
        return min(2, size) if config.topk_method == "noaux_tc" else 1
