"""Activation checkpointing, applied to a model from outside: layers are computed again in the
backward pass (the report's §3.2.3 does so with some of their operators).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rorqual.model import DeepseekV3
from rorqual.model.block import Block
from rorqual.model.mtp import MtpModule


class _Recomputed(nn.Module):
    def forward(self, *inputs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *inputs, use_reentrant=False)
        return super().forward(*inputs)


class RecomputedBlock(_Recomputed, Block):
    """A block that keeps its inputs alone."""


class RecomputedMtpModule(_Recomputed, MtpModule):
    """An MTP module that keeps its inputs alone."""


def recompute_layers(model: DeepseekV3) -> None:
    """Keeps no activations inside of layers, MTP modules included, while the model trains."""
    for layer in model.model.layers.values():
        layer.__class__ = RecomputedMtpModule if isinstance(layer, MtpModule) else RecomputedBlock
