"""Whole layers by the C++ kernels (`rorqual_layers.h`): a handle of some layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import byref, c_double

import torch

from rorqual.ops.native.library import library
from rorqual.ops.native.structs import Cache, Ends, Layer, Shape, Step

_NO_MEMORY = 3
PARTS = ("rows", "matrix", "attention", "experts", "routing")
"""What `take_seconds` tells apart."""


class NativeLayers:
    """Layers with what stands before and behind them; several threads may call it, in turn. What
    their weights point to lives as long as this does.
    """

    def __init__(self, shape: Shape, ends: Ends, layers: Sequence[Layer], kept: object) -> None:
        self._kept = kept
        loaded = library()
        assert loaded is not None, "nothing is packed where the library is not"
        self._run = loaded.rq_layers_run
        array = (Layer * len(layers))(*layers)
        self._handle = loaded.rq_layers_make(byref(shape), byref(ends), array, len(layers))
        if not self._handle:
            raise MemoryError("the C++ kernels got no memory for the layers")
        # Not at the process's end: a thread may still be within a step then.
        weakref.finalize(self, loaded.rq_layers_free, self._handle).atexit = False

    def run(self, step: Step, first_cache: Cache) -> None:
        """A step; the caches of the other layers follow the first one's in memory."""
        step.num_threads = torch.get_num_threads()
        status = self._run(self._handle, byref(first_cache), byref(step))
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
