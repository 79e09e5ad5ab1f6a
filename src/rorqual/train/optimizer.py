"""AdamW with float32 master parameters and float32 or bfloat16 moments (§3.3.2, §4.2; arXiv
1711.05101).

Float32 moments go through torch's fused kernel. No built-in takes bfloat16 moments beside float32
parameters, so those are updated here a tensor at a time in float32 and rounded to nearest.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.adamw import adamw

from rorqual.config import settings


@settings
class OptimizerSettings:
    """§4.2's values by default; the learning rate has its own section."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    moments: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.beta1 > self.beta2:
            raise ValueError(f"beta1 {self.beta1} exceeds beta2 {self.beta2}")
        return self


class AdamW:
    """Holds the moments of a model's parameters; `step(lr)` moves them by their `.grad`.

    Choice: weight decay on matrices (embedding and experts included), not on norms' vectors.
    """

    def __init__(self, model: nn.Module, options: OptimizerSettings) -> None:
        self.options = options
        self.parameters = dict(model.named_parameters())
        dtype = getattr(torch, options.moments)
        self.exp_avg = {n: torch.zeros_like(p, dtype=dtype) for n, p in self.parameters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(p, dtype=dtype) for n, p in self.parameters.items()}
        self.num_steps = 0

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def clip(self) -> Tensor:
        """The norm of all gradients before clipping; scales them down to `clip_norm`."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.options.clip_norm
        if limit is not None:  # times one where the norm is less: to ask would wait for a GPU
            torch._foreach_mul_(gradients, (limit / norm).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; a parameter without a gradient is left as it is, decay included."""
        self.num_steps += 1
        for is_matrix in (True, False):
            names = [
                name
                for name, p in self.parameters.items()
                if p.grad is not None and (p.dim() > 1) == is_matrix
            ]
            decay = self.options.weight_decay if is_matrix else 0.0
            if not names:
                continue
            if self.options.moments == "float32":
                self._fused(names, lr, decay)
            else:
                for name in names:
                    self._rounded(name, lr, decay)

    def _fused(self, names: list[str], lr: float, decay: float) -> None:
        options = self.options
        # The kernel counts from the steps before this one, each parameter on its own device.
        device = self.parameters[names[0]].device
        steps = torch.full((len(names),), float(self.num_steps - 1), device=device)
        adamw(
            [self.parameters[name] for name in names],
            [_gradient(self.parameters[name]) for name in names],
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            [],
            list(steps.unbind()),
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=options.beta1,
            beta2=options.beta2,
            lr=lr,
            weight_decay=decay,
            eps=options.eps,
            maximize=False,
        )

    def _rounded(self, name: str, lr: float, decay: float) -> None:
        options, parameter = self.options, self.parameters[name]
        gradient = _gradient(parameter)
        exp_avg = self.exp_avg[name].float().lerp_(gradient, 1 - options.beta1)
        exp_avg_sq = self.exp_avg_sq[name].float().mul_(options.beta2)
        exp_avg_sq.addcmul_(gradient, gradient, value=1 - options.beta2)
        self.exp_avg[name].copy_(exp_avg)
        self.exp_avg_sq[name].copy_(exp_avg_sq)
        correction1 = 1 - options.beta1**self.num_steps
        correction2 = 1 - options.beta2**self.num_steps
        denominator = exp_avg_sq.div_(correction2).sqrt_().add_(options.eps)
        parameter.mul_(1 - lr * decay).addcdiv_(exp_avg, denominator, value=-lr / correction1)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments by the name under which a checkpoint keeps them."""
        return {
            **{f"exp_avg.{name}": value for name, value in self.exp_avg.items()},
            **{f"exp_avg_sq.{name}": value for name, value in self.exp_avg_sq.items()},
        }


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter without a gradient reached the update"
    return parameter.grad
