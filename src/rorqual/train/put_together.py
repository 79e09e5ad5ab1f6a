"""What ranks hold of a model and its moments, put together on the first one: what is saved there is
what one rank would have saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model import DeepseekV3, empty
from rorqual.train.optimizer import AdamW
from rorqual.train.ranks import Spread, Whole, local


@dataclass(frozen=True)
class Moments:
    """As `AdamW` tells them."""

    num_steps: int
    tensors: Mapping[str, Tensor]

    def state_tensors(self) -> Mapping[str, Tensor]:
        return self.tensors


@torch.no_grad()
def whole_model(model: DeepseekV3, spread: Spread, *, is_first: bool) -> DeepseekV3 | None:
    """On the CPU of the first rank; all must ask. None on the others."""
    if isinstance(spread, Whole):
        return model
    parts = model.named_parameters()
    values = ((name, spread.whole(name, local(value))) for name, value in parts)
    if not is_first:
        for _ in values:
            pass
        return None
    whole = empty(model.config)
    places = dict(whole.named_parameters())
    for name, value in values:
        assert value is not None, "the first rank gets every parameter"
        places[name].copy_(value)
    for place, buffer in zip(whole.routers(), model.routers(), strict=True):
        place.load_state_dict(dict(buffer.named_buffers()), strict=False)
    whole.advice = model.advice
    return whole


@torch.no_grad()
def whole_moments(optimizer: AdamW, spread: Spread, *, is_first: bool) -> AdamW | Moments | None:
    """On the CPU of the first rank; all must ask. None on the others."""
    if isinstance(spread, Whole):
        return optimizer
    found = {
        key: spread.whole(key.partition(".")[2], value)
        for key, value in optimizer.state_tensors().items()
    }
    if not is_first:
        return None
    tensors = {key: value.cpu() for key, value in found.items() if value is not None}
    return Moments(optimizer.num_steps, tensors)
