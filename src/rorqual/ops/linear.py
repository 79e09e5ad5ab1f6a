"""Linear maps by torch's own operators, and their plain twins where those differ."""

# M rows, I inputs, O outputs, V vocabulary, H heads

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_float32(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> float32 (..., O): the product of x and the weight, both widened first."""
    return F.linear(x.float(), weight_OI.float())


def logits(h: Tensor, weight_VD: Tensor) -> Tensor:
    """h (..., D) -> float32 (..., V); summed as torch sums products of h's dtype."""
    return F.linear(h, weight_VD).float()


def head_linear(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    """Each head's rows times that head's matrix: (M, H, I) -> (M, H, O) in the weight's dtype."""
    return torch.einsum("mhi,hoi->mho", x_MHI, weight_HOI)


def head_linear_plain(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    """The twin: a product a head."""
    heads = zip(x_MHI.unbind(1), weight_HOI, strict=True)
    return torch.stack([F.linear(x_MI, weight_OI) for x_MI, weight_OI in heads], dim=1)
