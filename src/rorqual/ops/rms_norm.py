"""RMSNorm (arXiv 1910.07467); statistics are float32 whatever x's dtype."""

# D width of a row

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight; (..., D) -> (..., D)."""
    return weight_D * F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


def rms_norm_plain(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The twin: its formula."""
    wide = x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return weight_D * normed.to(x.dtype)
