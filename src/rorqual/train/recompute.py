"""Activation checkpointing, applied to a model from outside: layers are computed again in the
backward pass (the report's §3.2.3 does so with some of their operators).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rorqual.model import DeepseekV3


def recompute_layers(model: DeepseekV3) -> None:
    """Keeps no activations inside of layers, MTP modules included, while the model trains."""
    for layer in model.model.layers.values():
        layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: nn.Module, inner: Any, *inputs: Any) -> Any:
    if layer.training and torch.is_grad_enabled():
        return checkpoint(inner, *inputs, use_reentrant=False)
    return inner(*inputs)
