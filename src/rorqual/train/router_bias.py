"""Auxiliary-loss-free load balance: the router's bias follows the load (§2.1.2; arXiv 2408.15664).

Choice: the bias is not recentred to zero mean (torchtitan does, Megatron and the report do not). A
shift common to all experts changes no choice, neither among experts nor among groups.
"""

# L sparse layers, E experts

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rorqual.model.router import Router


@torch.no_grad()
def update_bias(routers: Sequence[Router], loads_LE: Iterable[Tensor], speed: float) -> None:
    """b += speed for an expert below its layer's mean load in the whole batch, -= speed above it.

    `loads_LE` are the counts of the whole batch: all micro-batches and all ranks. Routers without a
    bias (V2's form) are left alone.
    """
    if speed == 0.0:
        return
    for router, load_E in zip(routers, loads_LE, strict=True):
        if router.config.has_correction_bias:
            load_E = load_E.double()
            direction_E = (load_E.mean() - load_E).sign().float()
            router.e_score_correction_bias.add_(direction_E, alpha=speed)


def max_violation(loads_LE: Tensor) -> Tensor:
    """MaxVio of each layer (L,) float32: (highest load - mean load) / mean load."""
    loads = loads_LE.float()
    mean_L = loads.mean(dim=-1)
    return (loads.amax(dim=-1) - mean_L) / mean_L.clamp(min=1e-20)
