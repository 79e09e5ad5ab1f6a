"""Whole layers by the C++ kernels (`rorqual_layers.h`): a handle of some layers."""

# T tokens, D hidden size

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import byref, c_double

import torch
from torch import Tensor

from rorqual.ops.native.library import library
from rorqual.ops.native.structs import Cache, Layer, Shape, Step

_NO_MEMORY = 3
PARTS = ("rows", "matrix", "attention", "experts", "routing")
"""What `take_seconds` tells apart."""


class NativeLayers:
    """Layers whose weights live as long as this does; several threads may call it, in turn."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], kept: object) -> None:
        self._kept = kept
        loaded = library()
        assert loaded is not None, "nothing is packed where the library is not"
        self._library = loaded
        array = (Layer * len(layers))(*layers)
        self._handle = loaded.rq_layers_make(byref(shape), array, len(layers))
        if not self._handle:
            raise MemoryError("the C++ kernels got no memory for the layers")
        weakref.finalize(self, loaded.rq_layers_free, self._handle)

    def run(
        self,
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        places: tuple[Tensor, Tensor, Tensor, int],
        cache: Cache,
        norm: tuple[Tensor, float] | None,
    ) -> None:
        """x through the layers and the norm (weight, epsilon), in place; float32, contiguous.

        `angles`: cos and sin (T, R/2) float32. `places`: where each token's latent goes, spans
        (number, 5) and tables of blocks, all int64, and tokens of a block. `cache`: the first
        layer's, which the others' follow in memory.
        """
        cos, sin = angles
        places_T, spans_N5, tables, block_tokens = places
        for tensor in (x_TD, cos, sin):
            assert tensor.dtype is torch.float32, "rows are float32"
            assert tensor.is_contiguous(), "rows are contiguous"
        for tensor in (places_T, spans_N5, tables):
            assert tensor.dtype is torch.int64, "places are int64"
            assert tensor.is_contiguous(), "places are contiguous"
        step = Step(
            len(x_TD), len(spans_N5), block_tokens, cos.data_ptr(), sin.data_ptr(),
            places_T.data_ptr(), tables.data_ptr(), spans_N5.data_ptr(),
        )  # fmt: skip
        weight, eps = (None, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])
        self._library.rq_set_threads(torch.get_num_threads())
        status = self._library.rq_layers_run(
            self._handle, byref(cache), byref(step), weight, eps, x_TD.data_ptr()
        )
        if status == _NO_MEMORY:
            raise MemoryError("the C++ kernels got no memory for a step's activations")
        assert status == 0, f"the C++ kernels refuse a step: status {status}"


def take_seconds() -> dict[str, float]:
    """Seconds spent in each of `PARTS` since the last call, by whole layers of this process."""
    loaded = library()
    seconds = (c_double * len(PARTS))()
    if loaded is not None:
        loaded.rq_take_seconds(seconds)
    return dict(zip(PARTS, seconds, strict=True))
