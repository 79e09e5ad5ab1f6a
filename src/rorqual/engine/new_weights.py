"""New weights for a model that is there: all of those that are given, or none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rorqual.errors import UsageError, listing
from rorqual.model import DeepseekV3
from rorqual.model.stored import StoredStack

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOAD_DECODED = (
    "weights that run in the bytes of their file are not encoded anew: for others load the model "
    'with dtype="float32" or "bfloat16"'
)


@torch.no_grad()
def replace_weights(model: DeepseekV3, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters and the router bias of these names, in the model's dtype.

    UsageError, before anything is changed, for names that the model has not, for other shapes, for
    values that are no floating-point numbers or are nowhere, for two values of one tied matrix, and
    for weights that are stored in another form.
    """
    if not isinstance(tensors, Mapping):
        raise UsageError(
            "new weights are tensors by their names",
            found=type(tensors).__name__,
            expected="a dict, such as model.state_dict() gives",
        )
    places = model.state_dict()
    stored = _stored_names(model)
    faults = [
        fault for name, tensor in tensors.items() if (fault := _fault(name, tensor, places, stored))
    ] or _contradictions(tensors, places)
    if faults:
        raise UsageError(
            "the weights are not this model's",
            found=listing(faults),
            expected="names and shapes of model.state_dict(), floating-point values",
            fix=LOAD_DECODED if any(_owner(str(name), stored) for name in tensors) else None,
        )
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def _fault(
    name: object, tensor: object, places: Mapping[str, Tensor], stored: set[str]
) -> str | None:
    """What is wrong with a new weight, if anything."""
    if not isinstance(name, str):
        return f"{name!r} is no name"
    if _owner(name, stored):
        return f"{name} lies in the bytes of its file"
    if name not in places:
        return f"{name} is not in the model"
    if not isinstance(tensor, Tensor):
        return f"{name} is no tensor"
    if tensor.shape != places[name].shape:
        return f"{name} is {list(tensor.shape)} and not {list(places[name].shape)}"
    if tensor.dtype not in FLOATS:
        return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_meta or tensor.layout is not torch.strided:
        return f"{name} is on the device meta" if tensor.is_meta else f"{name} is sparse"
    return None


def _contradictions(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> list[str]:
    """Names of one matrix (an embedding that is the head too) that were given different values."""
    first: dict[int, str] = {}
    faults = []
    for name, tensor in tensors.items():
        other = first.setdefault(places[name].data_ptr(), name)
        if other != name and not torch.equal(tensor.cpu(), tensors[other].cpu()):
            faults.append(f"{other} and {name} are one matrix and differ")
    return faults


def _owner(name: str, stored: set[str]) -> str:
    """The module among these that a weight belongs to; empty: none."""
    while name and name not in stored:
        name = name.rpartition(".")[0]
    return name


def _stored_names(model: DeepseekV3) -> set[str]:
    """Modules whose weights lie in the bytes of their file."""
    names = (name for name, part in model.named_modules() if isinstance(part, StoredStack))
    return {name.rpartition(".")[0] for name in names}
