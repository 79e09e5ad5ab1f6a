"""RMSNorm and the SwiGLU feed-forward network: a block's plain parts (arXiv 2002.05202)."""

# B batch, T tokens, D hidden size, I intermediate size

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.served import Served
from rorqual.ops.kernels import TrainingKernels, storage_of
from rorqual.ops.swiglu import swiglu


class RMSNorm(Served):
    """x / rms(x) * weight; the statistics are float32 whatever x's dtype. Shape (..., D) -> (...,
    D).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def trained(
        self, x: Tensor, kernels: TrainingKernels, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """`forward` in a training step, rounded to `dtype`."""
        return kernels.norm(x, self.weight, self.eps, dtype)

    def storage(self) -> tuple[str, torch.device]:
        return storage_of(self.weight), self.weight.device


class Linear(Served, nn.Linear):
    """x (..., I) -> (..., O), without a bias: no projection of the architecture has one.

    `compute_dtype` is what it multiplies in, if not in its weight's own (`train.precision`).
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(self._cast(x), self._cast(self.weight))

    def storage(self) -> tuple[str, torch.device]:
        return storage_of(self.weight), self.weight.device

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.compute_dtype is None else x.to(self.compute_dtype)


class Head(Linear):
    """h (..., D) -> float32 logits (..., V). With targets, (N, D) -> the summed cross entropy of
    the rows marked in `is_target_N`, without ever holding all logits.
    """

    def forward(
        self, h: Tensor, targets_N: Tensor | None = None, is_target_N: Tensor | None = None
    ) -> Tensor:
        assert (targets_N is None) == (is_target_N is None), "targets come with their mask"
        if targets_N is None or is_target_N is None:
            return self.kernels.logits(self._cast(h), self._cast(self.weight))
        return self.kernels.linear_cross_entropy(self._cast(h), self.weight, targets_N, is_target_N)

    def token_losses(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Each row's cross entropy, (N,) float32, without gradients."""
        return self.kernels.token_losses(self._cast(h_ND), self._cast(self.weight), targets_N)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)): a dense FFN, or all shared experts as one."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    def trained(self, x_TD: Tensor, kernels: TrainingKernels) -> Tensor:
        """`forward` in a training step; the products are of x's dtype."""
        return kernels.feed_forward(
            x_TD, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        )
