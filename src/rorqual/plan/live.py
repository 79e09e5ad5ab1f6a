"""Bytes of tensors that are alive while something runs: for counting, on tensors without memory.

Every operation passes through `Live`, those of the backward pass too, so it sees whatever is kept,
by autograd or by a checkpoint, and what lives only for a moment. Memory that an operator takes
within itself it does not see.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """`now`: bytes of all tensors made under it that are still there; `most`: the most since
    `restart`. A view of a tensor from before counts nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[UntypedStorage]] = {}

    def restart(self) -> None:
        self.most = self.now

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {place for place, _ in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for place, storage in _storages(out):
            if place not in given and place not in self._seen:
                self._add(place, storage)
        return out

    def _add(self, place: int, storage: UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen[place] = weakref.ref(storage, partial(self._gone, place, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, place: int, size: int, _: object) -> None:
        del self._seen[place]
        self.now -= size


def _storages(values: Any) -> list[tuple[int, UntypedStorage]]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return [(storage._cdata, storage) for storage in storages]
