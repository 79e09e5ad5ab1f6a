"""What a stored model is made of, by name, and the model that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.balance import Balance
from rorqual.model.layers import Head, Linear
from rorqual.model.mla import LatentUp
from rorqual.model.moe import Experts
from rorqual.model.stored import (
    StoredEmbedding,
    StoredExperts,
    StoredHalves,
    StoredHead,
    StoredLinear,
    StoredStack,
)

EMBEDDING_STACK = "model.embed_tokens.stack"


@dataclass
class Parts:
    """Stacks by the names that they have in the model; norms, routers and biases in float32."""

    stacks: dict[str, StoredStack] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)


def assemble(config: ModelConfig, parts: Parts) -> DeepseekV3:
    """The model: what holds bytes in the place of what would hold floats."""
    with torch.device("meta"):
        model = DeepseekV3(config)
    for name, module in list(model.named_modules()):
        made = _part(name, module, config, parts.stacks)
        if made is not None:
            _put(model, name, made)
    for layer in model.sparse_layers():
        layer.balance = Balance(config.n_routed_experts)
    for name, values in parts.floats.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        is_parameter = key in module._parameters
        setattr(module, key, nn.Parameter(values, requires_grad=False) if is_parameter else values)
    model.model.rotary.reset_buffers()
    assert not any(parameter.is_meta for parameter in model.parameters()), "the audit found all"
    return model


def _part(
    name: str, module: nn.Module, config: ModelConfig, stacks: dict[str, StoredStack]
) -> nn.Module | None:
    """What stands in a module's place, if it has matrices."""
    if isinstance(module, Experts):
        return StoredExperts(*(stacks[f"{name}.{part}"] for part in ("gate", "up", "down")))
    if isinstance(module, LatentUp):
        return StoredHalves(stacks[f"{name}.keys"], stacks[f"{name}.values"])
    is_tied = config.tie_word_embeddings
    if isinstance(module, nn.Embedding):
        return StoredEmbedding(stacks[EMBEDDING_STACK])
    if isinstance(module, Head):
        return StoredHead(stacks[EMBEDDING_STACK if is_tied else f"{name}.stack"])
    return StoredLinear(stacks[f"{name}.stack"]) if isinstance(module, Linear) else None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, module)
