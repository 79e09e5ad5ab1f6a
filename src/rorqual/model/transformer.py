"""The whole model: embedding, blocks, norm, head, and the MTP modules behind them (report §2).

Body, MTP modules and head are modules with `forward`: the trainer, the engine and parallelism wrap
them from outside. Parameter names are the checkpoint's, with experts stacked.
"""

# B batch, T tokens, D hidden size, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rorqual.errors import UsageError
from rorqual.model.balance import BalanceTerm
from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.dispatch import Dispatcher, LocalDispatcher
from rorqual.model.fused import Shared, fused
from rorqual.model.layers import Head, RMSNorm
from rorqual.model.moe import MoE
from rorqual.model.mtp import MtpModule
from rorqual.model.rope import AngleTable, RotaryAngles
from rorqual.model.router import Router
from rorqual.model.served import Fusable
from rorqual.model.step import CacheView, Step, WholeView, isolated
from rorqual.model.stored import StoredStack
from rorqual.ops.kernels import TrainingKernels


class Body(nn.Module):
    """forward(tokens_BT int64, step) -> h_BTD after the last norm: the parameters under `model.` in
    a checkpoint. The MTP modules are its last layers and run by themselves.

    Layers live under their ids, so that a stage of a pipeline may hold some of them. Given hidden
    states in place of tokens it goes on from these; without the norm it returns hidden states for
    the next stage. Where `is_fusable` is false, training kernels are not used: something outside
    counts on what layers are made of.
    """

    is_fusable = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_main_layers = config.num_hidden_layers
        self.embed_tokens: nn.Module | None
        # torch's own initial values would import its compiler on the device meta: two seconds.
        vocab_size, dim = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(vocab_size, dim, _weight=torch.empty(vocab_size, dim))
        kinds = {True: Block, False: MtpModule}
        self.layers = nn.ModuleDict(
            {
                str(i): kinds[i < config.num_hidden_layers](config, i)
                for i in range(config.num_layers_with_mtp)
            }
        )
        self.norm: RMSNorm | None = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryAngles(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if not x.is_floating_point():
            assert self.embed_tokens is not None, "a stage without the embedding takes no tokens"
            x = self.embed_tokens(x)
        for layer_id, layer in self.layers.items():
            if int(layer_id) < self.num_main_layers:
                x = layer(x, step)
        if self.norm is None:
            return x
        return self.norm(x) if step.training is None else self.norm.trained(x, step.training)

    def step(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        *,
        use_absorbed: bool = False,
        balance: Tensor | None = None,
        training: TrainingKernels | None = None,
    ) -> Step:
        """The step of tokens without a cache, from position 0 on.

        `documents_BT` numbers packed documents (0: no document): a token sees only its own, and
        positions count from its beginning. `balance` is the coefficient of the balance loss, in
        training; `training` kernels compute that where they serve these parameters.
        """
        visible: Tensor | None = None
        exists_BT: Tensor | None = None
        if documents_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        else:
            positions_BT, visible = isolated(documents_BT)
            exists_BT = documents_BT > 0
        cos, sin = self.rotary(positions_BT)
        if balance is None:
            return Step(cos, sin, WholeView(visible, use_absorbed))
        term = BalanceTerm(balance, exists_BT)
        is_served = tokens_BT.is_cpu and next(self.parameters()).dtype is torch.float32
        if training is None or not (is_served and self.is_fusable):
            return Step(cos, sin, WholeView(visible), balance=term)
        if documents_BT is not None:
            documents_BT = documents_BT.contiguous()
        return Step(cos, sin, balance=term, training=training, documents_BT=documents_BT)

    def cached_step(
        self, positions_BT: Tensor, cache: CacheView, dispatcher: Dispatcher | None = None
    ) -> Step:
        """The step of tokens at these rotary positions, whose past is in a cache."""
        cos, sin = self.rotary(positions_BT)
        return Step(cos, sin, cache, dispatcher or LocalDispatcher())


class DeepseekV3(Fusable):
    """model(tokens_BT int64) -> logits_BTV float32: `head` of the body; `mtp_hidden` goes further.

    `advice` holds, by file name, the tables of the JSON files that lay beside the weights when it
    was loaded: where its answers end and how it is sampled. `weights.save` writes them again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head: Head | None = Head(config.hidden_size, config.vocab_size)
        self.tie()
        self.advice: dict[str, dict[str, Any]] = {}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) float32 logits; UsageError for tokens that are no such ids."""
        self._check_tokens(tokens_BT)
        return self.head(self.hidden(tokens_BT))

    def _check_tokens(self, tokens: object) -> None:
        found = type(tokens).__name__
        if isinstance(tokens, Tensor):
            found = f"shape {tuple(tokens.shape)}, {tokens.dtype}"
            is_row = tokens.dim() == 2 and tokens.dtype in (torch.int64, torch.int32)
            is_row = is_row and tokens.numel() > 0
            # To look at the ids would make a GPU wait, and break a graph in the middle.
            is_seen = tokens.is_cpu and not torch.compiler.is_compiling()
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

    def hidden(self, tokens_BT: Tensor, step: Step | None = None) -> Tensor:
        """(B, T) int64 -> hidden states (B, T, D) after `model.norm`; see `Body.step`."""
        h_BTD: Tensor = self.model(tokens_BT, step or self.model.step(tokens_BT))
        return h_BTD

    def mtp_hidden(
        self, depth: int, h_BTD: Tensor, next_tokens_BT: Tensor, step: Step | None = None
    ) -> Tensor:
        """Depth `depth`, from 1: the hidden states of depth - 1 -> the next depth's.

        `next_tokens_BT[:, i]` is token i + depth; `head` of the result predicts token i + depth +
        1. The step is that of position i: its documents come from `mtp.documents_at`.
        """
        module = self.model.layers[str(self.config.num_hidden_layers + depth - 1)]
        assert isinstance(module, MtpModule), (
            f"layer {depth} beyond the main model is not an MTP module"
        )
        assert self.model.embed_tokens is not None, "MTP needs the embedding, or a copy of it"
        embedding = self.model.embed_tokens(next_tokens_BT)
        next_BTD: Tensor = module(h_BTD, embedding, step or self.model.step(next_tokens_BT))
        return next_BTD

    def head(self, h: Tensor) -> Tensor:
        """(..., D) -> float32 logits (..., V)."""
        assert self.lm_head is not None, "a pipeline's stage without the head has no logits"
        logits: Tensor = self.lm_head(h)
        return logits

    def token_losses(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Each row's cross entropy, (N,) float32, without gradients."""
        assert self.lm_head is not None, "a pipeline's stage without the head has no losses"
        return self.lm_head.token_losses(h_ND, targets_N)

    def fuse(self) -> None:
        body, head = self.model, self.lm_head
        self.fused = None
        if body.embed_tokens is not None and body.norm is not None and head is not None:
            shared = Shared(body.embed_tokens, head, AngleTable(body.rotary))
            self.fused = fused(list(body.layers.values()), body.norm, shared)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are made of."""
        return next(self.parameters()).dtype

    @property
    def is_stored(self) -> bool:
        """Whether its matrices are in the bytes of their file (`model/stored.py`)."""
        return any(isinstance(module, StoredStack) for module in self.modules())

    def tie(self) -> None:
        """Makes the head's matrix the embedding's, where the configuration says so."""
        embedding = self.model.embed_tokens
        if not self.config.tie_word_embeddings:
            return
        if isinstance(embedding, nn.Embedding) and self.lm_head is not None:
            self.lm_head.weight = embedding.weight

    def routers(self) -> list[Router]:
        return [layer.gate for layer in self.sparse_layers()]

    def sparse_layers(self) -> list[MoE]:
        """The MoE parts in the order of layers, the MTP modules' last."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def sparse_rows(self) -> list[int]:
        """Which of the whole model's sparse layers these are, from 0: what holds a part of a model
        has some of them.
        """
        ids = enumerate(self.config.sparse_layer_ids)
        return [row for row, layer_id in ids if str(layer_id) in self.model.layers]

    @property
    def is_whole(self) -> bool:
        """Whether it holds all layers and both ends; a stage of a pipeline does not."""
        body = self.model
        has_ends = None not in (body.embed_tokens, body.norm, self.lm_head)
        return has_ends and len(body.layers) == self.config.num_layers_with_mtp

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """§4.2: every matrix from N(0, initializer_range), norms one, the correction bias zero.

        What holds a part of a model draws the numbers of all, so that it has the whole one's.
        """
        held = dict(self.named_parameters())
        whole = held if self.is_whole else empty(self.config, device="meta").named_parameters()
        with torch.no_grad():
            for name, like in dict(whole).items():
                found = held.get(name)
                parameter: Tensor = (
                    torch.empty_like(like, device=self.device) if found is None else found
                )
                if parameter.dim() > 1:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
                else:
                    assert name.endswith("norm.weight"), f"no rule to initialise {name}"
                    parameter.fill_(1.0)
            for layer in self.sparse_layers():
                layer.balance.reset()
                if self.config.has_correction_bias:
                    layer.gate.e_score_correction_bias.zero_()


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
        materialise(model, device)
    return model


def materialise(model: DeepseekV3, device: str | torch.device) -> None:
    """Gives a model on the device meta its memory; parameters and biases hold no values yet."""
    model.to_empty(device=device)
    model.model.rotary.reset_buffers()
    model.model.rotary.to(device)
    for layer in model.sparse_layers():
        layer.balance.reset()
    model.tie()
