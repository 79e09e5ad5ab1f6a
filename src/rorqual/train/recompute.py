"""What a layer computes again in the backward pass instead of keeping it (report §3.2.3), applied
to a model from outside.

| `training.activation_checkpointing` | computed again |
|---|---|
| `none` | nothing |
| `norms` | RMSNorm and MLA's up-projections, the report's choice (`recompute_norms.py`) |
| `layers` | whole layers, which keep their inputs alone |
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rorqual.model import DeepseekV3
from rorqual.model.block import Block
from rorqual.model.mtp import MtpModule
from rorqual.train.recompute_norms import recompute_norms

Recompute = Literal["none", "norms", "layers"]


class _Recomputed(nn.Module):
    def forward(self, *inputs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *inputs, use_reentrant=False)
        return super().forward(*inputs)


class RecomputedBlock(_Recomputed, Block):
    """A block that keeps its inputs alone."""


class RecomputedMtpModule(_Recomputed, MtpModule):
    """An MTP module that keeps its inputs alone."""


def recompute(model: DeepseekV3, what: Recompute) -> None:
    """Applies the recipe's choice, while the model trains; once."""
    if what == "norms":
        recompute_norms(model)
    elif what == "layers":
        recompute_layers(model)


def recompute_layers(model: DeepseekV3) -> None:
    """Keeps no activations inside of layers, MTP modules included, while the model trains."""
    for layer in model.model.layers.values():
        layer.__class__ = RecomputedMtpModule if isinstance(layer, MtpModule) else RecomputedBlock
