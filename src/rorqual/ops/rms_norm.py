"""RMSNorm (arXiv 1910.07467): one kernel where a decode step would else spend eight operators."""

# D width of a row

from __future__ import annotations

from functools import cache

import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.compiled import Compiled, can_compile
from rorqual.ops.linear import KERNEL_ROWS, widens


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight; (..., D) -> (..., D). Statistics are float32 whatever x's dtype."""
    is_decode = x.numel() <= KERNEL_ROWS * x.shape[-1]
    if is_decode and widens(weight_D) and can_compile():
        return _kernel(eps)(x, weight_D)
    return _rms_norm(x, weight_D, eps)


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D * F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


@cache
def _kernel(eps: float) -> Compiled:
    return Compiled(lambda x, weight_D: _rms_norm(x, weight_D, eps))
