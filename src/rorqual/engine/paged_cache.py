"""The paged latent cache: for each token and layer only the normed latent and the shared rotary key
(report §2.1.1), in blocks that any sequence may own.

A sequence's *slot* s is its token s; block table and slot give the place in the pool. A depth of
MTP is a layer of its own: what depth d computes from the token in slot s it stores in slot s, so
that a block depends on no token beyond its end, though its rotary position is s - d (in training
depth d takes place i for token i + d). The first d slots of depth d stay empty.
"""

# P blocks, Q tokens a block, M tokens of a step, B sequences, S slots, L latent width,
# N MTP depths, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rorqual.engine.cache_formats import CacheDtype, bytes_per_token, store, stored_as
from rorqual.model import ModelConfig, Part
from rorqual.ops.native.structs import CACHE_KINDS, Cache


@dataclass(frozen=True)
class Reach:
    """What one part of a step looks at: its sequences' slots from `first` to below `stop`.

    The blocks of a single sequence may be neighbours from `first_block` on, and are then read in
    place; otherwise they are gathered.
    """

    num_tokens: int
    first: int
    stop: int
    blocks_BP: Tensor
    first_block: int | None
    visible: Tensor | None
    use_absorbed: bool


class PagedLatentCache:
    """Room for `num_blocks` blocks in every layer, of `num_depths` MTP depths too.

    `boundary_PND` keeps with a full block what the next slot's token needs of the past: the input
    state of each MTP depth there.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: tuple[int, int],
        kind: CacheDtype,
        like: Tensor,
        num_depths: int = 0,
    ) -> None:
        num_layers = config.num_hidden_layers + num_depths
        self.block_tokens = shape[1]
        self._layers = [store(config, shape, kind, like) for _ in range(num_layers)]
        self._kind = stored_as(kind, like.dtype)
        self.boundary_PND = like.new_zeros(shape[0], num_depths, config.hidden_size)

    def write(self, layer_id: int, places_M: Tensor, latent_ML: Tensor) -> None:
        """Stores latents at these places of the pool (block * block_tokens + offset)."""
        layer = self._layers[layer_id]
        for plane, values in zip(layer.planes, layer.encode(latent_ML), strict=True):
            plane.flatten(0, 1)[places_M] = values

    def read(self, layer_id: int, reach: Reach) -> Tensor:
        """(B, S, L): the slots of a part's sequences, side by side."""
        layer = self._layers[layer_id]
        first, stop = reach.first, reach.stop
        if reach.first_block is not None:
            offset = reach.first_block * self.block_tokens
            run = slice(offset + first, offset + stop)
            return layer.decode([plane.flatten(0, 1)[run] for plane in layer.planes])[None]
        planes = [plane[reach.blocks_BP].flatten(1, 2)[:, first:stop] for plane in layer.planes]
        return layer.decode(planes)

    @cached_property
    def structs(self) -> Array[Cache]:
        """All layers, as the C++ kernels read and write them."""
        structs = (Cache * len(self._layers))()
        for struct, layer in zip(structs, self._layers, strict=True):
            struct.kind = CACHE_KINDS[self._kind]
            struct.planes[: len(layer.planes)] = [plane.data_ptr() for plane in layer.planes]
        return structs

    @property
    def device(self) -> torch.device:
        return self.boundary_PND.device

    @property
    def num_bytes(self) -> int:
        planes = [plane for layer in self._layers for plane in layer.planes]
        return sum(t.numel() * t.element_size() for t in [*planes, self.boundary_PND])


def block_bytes(
    config: ModelConfig, block_tokens: int, kind: CacheDtype, dtype: torch.dtype, num_depths: int
) -> int:
    """Memory of one block through all layers."""
    num_layers = config.num_hidden_layers + num_depths
    latents = num_layers * block_tokens * bytes_per_token(config, kind, dtype)
    return latents + num_depths * config.hidden_size * dtype.itemsize


@dataclass(frozen=True)
class StepView:
    """The model's `CacheView` of one step: where it writes, and what each part reads."""

    cache: PagedLatentCache
    places_M: Tensor
    reaches: Sequence[Reach]

    def append(self, layer_id: int, latent_BTL: Tensor) -> list[Part]:
        self.cache.write(layer_id, self.places_M, latent_BTL.flatten(0, 1))
        return [
            Part(
                reach.num_tokens,
                self.cache.read(layer_id, reach),
                reach.visible,
                reach.use_absorbed,
            )
            for reach in self.reaches
        ]
