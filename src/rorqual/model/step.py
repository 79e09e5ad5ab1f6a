"""What all layers of one forward share. Each stage of a pipeline builds it for itself, from tokens
and documents, which every rank is given.
"""

# B batch, T queries, S tokens that are seen, R rotary width, L latent width

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.model.balance import BalanceTerm
from rorqual.model.dispatch import Dispatcher, LocalDispatcher
from rorqual.ops.kernels import TrainingKernels


class Part(NamedTuple):
    """The next `num_tokens` tokens of a step, T of each of B sequences, and all they may look at.

    `visible` (B, 1, T, S) boolean; None means that a sequence's queries are the last T of its S
    tokens, and causal.
    """

    num_tokens: int
    latent_BSL: Tensor
    visible: Tensor | None
    use_absorbed: bool


class CacheView(Protocol):
    """The cache of a step: it takes a layer's new latents and says what the step attends to."""

    def append(self, layer_id: int, latent_BTL: Tensor) -> Sequence[Part]:
        """Stores the latents of the step's tokens; returns the parts that they make, in order."""
        ...


class WholeView(NamedTuple):
    """No cache: a step's tokens see each other. `visible` and `use_absorbed` as in `Part`."""

    visible: Tensor | None = None
    use_absorbed: bool = False

    def append(self, layer_id: int, latent_BTL: Tensor) -> tuple[Part]:
        num_tokens = latent_BTL.shape[0] * latent_BTL.shape[1]
        return (Part(num_tokens, latent_BTL, self.visible, self.use_absorbed),)


class Step(NamedTuple):
    """cos and sin (B, T, R/2) are the angles of its tokens. `cache` takes their latents and says
    what they see. `balance` is there in training alone. With `training` kernels layers compute by
    these, tokens see each other within `documents_BT` (None: all are one), and the cache is unused.
    """

    cos: Tensor
    sin: Tensor
    cache: CacheView = WholeView()
    dispatcher: Dispatcher = LocalDispatcher()
    balance: BalanceTerm | None = None
    training: TrainingKernels | None = None
    documents_BT: Tensor | None = None


def isolated(documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(positions_BT from each document's start, visible (B, 1, T, T): earlier and of the same)."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    visible_BTS = is_same_BTS & (places_T[:, None] >= places_T)
    return visible_BTS.sum(-1) - 1, visible_BTS[:, None]
