"""The whole model: embedding, blocks, norm, head, and the MTP modules behind them (report §2).

`hidden` is the body and `head` the rest; the trainer, the engine and parallelism wrap them from
outside. Parameter names are the checkpoint's, with experts stacked.
"""

# B batch, T tokens, D hidden size, V vocabulary

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rorqual.errors import UsageError
from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.mla import AttentionStep, CacheView
from rorqual.model.mtp import MtpModule
from rorqual.model.rope import RotaryAngles
from rorqual.model.router import Router, Routing
from rorqual.ops.linear import logits


class Hidden(NamedTuple):
    """h_BTD after the last norm, and the routing of each sparse layer that was run."""

    h_BTD: Tensor
    routing: list[Routing]


class Context(NamedTuple):
    """Where a step's tokens stand: their rotary positions, and the cache, which knows what each
    sees.
    """

    positions_BT: Tensor
    cache: CacheView


class Body(nn.Module):
    """The parameters under `model.` in a checkpoint; the MTP modules are its last layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, i) for i in range(config.num_hidden_layers)]
        modules = [
            MtpModule(config, i)
            for i in range(config.num_hidden_layers, config.num_layers_with_mtp)
        ]
        self.layers = nn.ModuleList([*blocks, *modules])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryAngles(config)


class DeepseekV3(nn.Module):
    """model(tokens_BT int64) -> logits_BTV float32: `head` of `hidden`; `mtp_hidden` goes further.

    `use_activation_checkpointing` recomputes each block in the backward pass instead of keeping its
    activations. `advice` are the tables of JSON files that lay beside the weights when it was
    loaded, by name: where its answers end and how it is sampled. `weights.save` writes them again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.use_activation_checkpointing = False
        self.advice: dict[str, dict[str, Any]] = {}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) float32 logits; UsageError for tokens that are no such ids."""
        self._check_tokens(tokens_BT)
        return self.head(self.hidden(tokens_BT).h_BTD)

    def _check_tokens(self, tokens: object) -> None:
        found = type(tokens).__name__
        if isinstance(tokens, Tensor):
            found = f"shape {tuple(tokens.shape)}, {tokens.dtype}"
            is_row = tokens.dim() == 2 and tokens.dtype in (torch.int64, torch.int32)
            # To look at the ids would make a GPU wait, and break a graph in the middle.
            is_seen = tokens.is_cpu and tokens.numel() > 0 and not torch.compiler.is_compiling()
            if is_row and not is_seen:
                return
            if is_row:
                first, last = (int(value) for value in tokens.aminmax())
                if 0 <= first <= last < self.config.vocab_size:
                    return
                found = f"ids {first} to {last}"
        raise UsageError(
            "the tokens are no batch of token ids",
            found=found,
            expected=f"int64 of shape (B, T), ids from 0 to {self.config.vocab_size - 1}",
            fix="one row of ids is a batch of one: torch.tensor([ids])",
        )

    def hidden(
        self,
        tokens_BT: Tensor,
        context: Context | None = None,
        *,
        documents_BT: Tensor | None = None,
        use_absorbed: bool = False,
    ) -> Hidden:
        """The body: (B, T) int64 -> hidden states after `model.norm`.

        Without a context, tokens start at position 0. With `documents_BT`, the numbers of packed
        documents (0 for what belongs to none), each sees itself alone and counts from 0.
        `use_absorbed` is MLA's form where no cache chooses it.
        """
        step = self._step(tokens_BT, context, documents_BT, use_absorbed)
        x_BTD = self.model.embed_tokens(tokens_BT)
        routings = []
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            if self.use_activation_checkpointing and self.training:
                x_BTD, routing = checkpoint(layer, x_BTD, step, use_reentrant=False)
            else:
                x_BTD, routing = layer(x_BTD, step)
            if routing is not None:
                routings.append(routing)
        return Hidden(self.model.norm(x_BTD), routings)

    def mtp_hidden(
        self,
        depth: int,
        h_BTD: Tensor,
        next_tokens_BT: Tensor,
        context: Context | None = None,
        *,
        documents_BT: Tensor | None = None,
        use_absorbed: bool = False,
    ) -> Hidden:
        """Depth `depth`, from 1: the hidden states of depth - 1 -> the next depth's.

        `next_tokens_BT[:, i]` is token i + depth; `head` of the result predicts token i + depth +
        1. `documents_BT` comes from `mtp.documents_at`: positions, not next tokens, are numbered.
        """
        module = self.model.layers[self.config.num_hidden_layers + depth - 1]
        assert isinstance(module, MtpModule), (
            f"layer {depth} beyond the main model is not an MTP module"
        )
        step = self._step(next_tokens_BT, context, documents_BT, use_absorbed)
        embedding = self.model.embed_tokens(next_tokens_BT)
        if self.use_activation_checkpointing and self.training:
            h_BTD, routing = checkpoint(module.predict, h_BTD, embedding, step, use_reentrant=False)
        else:
            h_BTD, routing = module.predict(h_BTD, embedding, step)
        return Hidden(h_BTD, [routing] if routing is not None else [])

    def head(self, h: Tensor) -> Tensor:
        """(..., D) -> float32 logits (..., V)."""
        return logits(h, self.lm_head.weight)

    def routers(self) -> list[Router]:
        """The routers in the order of `Hidden.routing`: main layers first, then the MTP modules."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """§4.2: every matrix from N(0, initializer_range), norms one, the correction bias zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
                else:
                    assert name.endswith("norm.weight"), f"no rule to initialise {name}"
                    parameter.fill_(1.0)
            for router in self.routers():
                if self.config.has_correction_bias:
                    router.e_score_correction_bias.zero_()

    def _step(
        self,
        tokens_BT: Tensor,
        context: Context | None,
        documents_BT: Tensor | None,
        use_absorbed: bool,
    ) -> AttentionStep:
        visible: Tensor | None = None
        cache: CacheView | None = None
        if context is not None:
            assert documents_BT is None, "a cache holds one document a row"
            positions_BT, cache = context
        elif documents_BT is not None:
            positions_BT, visible = isolated(documents_BT)
        else:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        cos, sin = self.model.rotary(positions_BT)
        return AttentionStep(cos, sin, visible, cache, use_absorbed)


def isolated(documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(positions_BT from each document's start, visible (B, 1, T, T): earlier and of the same)."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    visible_BTS = is_same_BTS & (places_T[:, None] >= places_T)
    return visible_BTS.sum(-1) - 1, visible_BTS[:, None]


def build(config: ModelConfig, *, seed: int = 0) -> DeepseekV3:
    """A freshly initialised model in float32 on the CPU."""
    model = empty(config)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


def empty(
    config: ModelConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DeepseekV3:
    """A model whose parameters hold no values yet (a loader or `reset_parameters` gives them).

    With device "meta" it takes no memory. The correction bias stays float32 whatever `dtype` is.
    """
    with torch.device("meta"):
        model = DeepseekV3(config)
    for name, parameter in model.named_parameters():
        assert parameter.is_floating_point(), f"{name} is not floating point"
        parameter.data = parameter.data.to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.model.rotary.reset_buffers()
        model.model.rotary.to(device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
    return model
