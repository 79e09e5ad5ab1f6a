"""Mixed precision (report §3.3.1's BF16 baseline), applied to a model from outside.

Matrix products run in bfloat16 over float32 weights, which are rounded for each; their gradients
come back in float32. Embedding, norms, router, softmax and the residual stream stay float32.
"""

from __future__ import annotations

import torch

from rorqual.model import DeepseekV3
from rorqual.model.layers import Linear
from rorqual.model.moe import Experts


def compute_in(model: DeepseekV3, precision: str) -> None:
    """`precision` is float32 or bfloat16: what the model's products are computed in."""
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.compute_dtype = dtype
