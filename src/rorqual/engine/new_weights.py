"""New weights for a model that is there: all of those that are given, or none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rorqual.errors import UsageError, listing
from rorqual.model import DeepseekV3


@torch.no_grad()
def replace_weights(model: DeepseekV3, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters and the router bias of these names, in the model's dtype.

    UsageError, before anything is changed, for names that the model has not and for other shapes.
    """
    places = model.state_dict()
    faults = [
        f"{name} {'is not in the model' if name not in places else _shapes(tensor, places[name])}"
        for name, tensor in tensors.items()
        if name not in places or tensor.shape != places[name].shape
    ]
    if faults:
        raise UsageError(
            "the weights are not this model's",
            found=listing(faults),
            expected="names and shapes of model.state_dict()",
        )
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def _shapes(found: Tensor, expected: Tensor) -> str:
    return f"is {list(found.shape)} and not {list(expected.shape)}"
