"""A model's parts are given their kernels from outside, by `use_kernels`; until then they have
torch's own, or for weights in the bytes of their file the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from rorqual.errors import UsageError
from rorqual.log import logger
from rorqual.ops.kernels import AUTO, TORCH, WIDENED, Kernels, Machine, choose, named

log = logger("model")


class Served(nn.Module):
    """A part of a model that computes with its `kernels`. They were chosen for one storage on one
    device: casting or moving the part brings back its class's own, until `use_kernels` chooses.
    """

    kernels: Kernels[Any] = TORCH
    _chosen_for: tuple[str, torch.device] | None = None

    def storage(self) -> tuple[str, torch.device]:
        """How its weights are stored (as `Rule.storages` names it), and on which device."""
        raise NotImplementedError(type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._chosen_for not in (None, self.storage()):
            self.kernels, self._chosen_for = type(self).kernels, None
        return self

    def take(self, kernels: Kernels[Any]) -> None:
        """Kernels that can serve what it holds now."""
        self.kernels, self._chosen_for = kernels, self.storage()


class Fusable(nn.Module):
    """A model that may run whole, in one call (`model/fused.py`), while its weights stay where they
    are.
    """

    fused: Any = None

    def fuse(self) -> None:
        """Called when kernels were chosen: sets `fused`, or None where there is no such call."""
        raise NotImplementedError(type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.fused = None
        return super()._apply(fn, recurse)


def use_kernels(model: nn.Module, name: str = AUTO, machine: Machine | None = None) -> None:
    """Chooses for each part by what it holds; with a name those kernels, wherever they can serve.

    The model keeps them; a later choice replaces an earlier one. UsageError for kernels that can
    serve none of its parts on this machine.
    """
    parts = [module for module in model.modules() if isinstance(module, Served)]
    chosen = []
    for part in parts:
        storage, device = part.storage()
        chosen.append(choose(storage, machine or Machine.of(device), name))
    if WIDENED in chosen and name == AUTO:
        has_native = (machine or Machine.of(torch.device("cpu"))).has_native
        log.warning(
            "bfloat16 decodes several times slower than it could: this processor has no bfloat16 "
            "arithmetic (%sload the model as native, or as float32)",
            "" if has_native else "install g++ or clang++, then rorqual again, and ",
        )
    names = {kernels.name for kernels in chosen}
    if name != AUTO and name not in names:
        raise UsageError(
            f"the kernels {named(name).name!r} serve no part of this model here",
            found=f"what serves it: {', '.join(sorted(names))}",
            fix=f"leave the choice to {AUTO!r}",
        )
    for part, kernels in zip(parts, chosen, strict=True):
        part.take(kernels)
    for module in model.modules():
        if isinstance(module, Fusable):
            module.fuse()
