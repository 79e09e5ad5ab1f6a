"""AdamW with float32 master parameters and float32 or bfloat16 moments (§3.3.2, §4.2; arXiv
1711.05101).

Float32 moments go through torch's fused kernel. No built-in takes bfloat16 moments beside float32
parameters, so those are updated here a tensor at a time in float32 and rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.adamw import adamw

from rorqual.config import settings
from rorqual.train.ranks import local

MOMENTS = ("exp_avg", "exp_avg_sq")


@settings
class OptimizerSettings:
    """§4.2's values by default; the learning rate has its own section."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's memory of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's memory of its square; at least `beta1`. Batches of a thousand tokens want 0.999."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices, not of norms; times the learning rate."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's, beside the root of the second moment."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """The largest norm of all gradients together; a step beyond it is scaled down to it."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How AdamW's moments are stored; bfloat16 halves their memory."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if self.beta1 > self.beta2:
            raise ValueError(f"beta1 {self.beta1} exceeds beta2 {self.beta2}")
        return self


class AdamW(torch.optim.Optimizer):
    """The moments of a model's parameters; `step()` moves these by their `.grad`. Of parameters
    that ranks share, this rank's part.

    Choice: weight decay on matrices (embedding and experts included), not on norms' vectors.
    """

    def __init__(self, model: nn.Module, options: OptimizerSettings) -> None:
        self.options = options
        self.num_steps = 0
        # Names of what another rank has too, with the same gradient, and counts in the norm.
        self.copies: frozenset[str] = frozenset()
        self.named = dict(model.named_parameters())
        groups = [
            {"params": [p for p in self.named.values() if is_one(p)], "weight_decay": decay}
            for is_one, decay in ((_is_matrix, options.weight_decay), (_is_vector, 0.0))
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        dtype = getattr(torch, options.moments)
        for parameter in self.named.values():
            self.state[parameter] = {
                moment: torch.zeros_like(local(parameter), dtype=dtype) for moment in MOMENTS
            }

    @torch.no_grad()
    def clip(self, norm_of_all: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
        """The norm of all gradients before clipping; scales them down to `clip_norm`.

        Where other ranks hold some, `norm_of_all` makes their common norm of this rank's own.
        """
        gradients = {n: local(p.grad) for n, p in self.named.items() if p.grad is not None}
        counted = [grad for name, grad in gradients.items() if name not in self.copies]
        norm = norm_of_all(torch.nn.utils.get_total_norm(counted))
        limit = self.options.clip_norm
        if limit is not None:  # a factor of one, not an `if`, which would wait for a GPU
            torch._foreach_mul_(list(gradients.values()), (limit / norm).clamp(max=1.0))
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; a parameter without a gradient is left as it is, decay included."""
        assert closure is None, "a step's loss is known before it"
        self.num_steps += 1
        for group in self.param_groups:
            moved = (p for p in group["params"] if p.grad is not None)
            parameters = [p for p in moved if local(p).numel()]  # of small ones a rank has none
            if parameters and self.options.moments == "float32":
                self._fused(parameters, group["lr"], group["weight_decay"])
            elif parameters:
                for parameter in parameters:
                    self._rounded(parameter, group["lr"], group["weight_decay"])

    def _fused(self, parameters: list[Tensor], lr: float, decay: float) -> None:
        options = self.options
        # The kernel counts from the steps before this one, each parameter on its own device.
        device = parameters[0].device
        steps = torch.full((len(parameters),), float(self.num_steps - 1), device=device)
        adamw(
            [local(parameter) for parameter in parameters],
            [_gradient(parameter) for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
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

    def _rounded(self, parameter: Tensor, lr: float, decay: float) -> None:
        options, gradient = self.options, _gradient(parameter)
        kept = [self.state[parameter][moment] for moment in MOMENTS]
        exp_avg = kept[0].float().lerp_(gradient, 1 - options.beta1)
        exp_avg_sq = kept[1].float().mul_(options.beta2)
        exp_avg_sq.addcmul_(gradient, gradient, value=1 - options.beta2)
        kept[0].copy_(exp_avg)
        kept[1].copy_(exp_avg_sq)
        correction1 = 1 - options.beta1**self.num_steps
        correction2 = 1 - options.beta2**self.num_steps
        denominator = exp_avg_sq.div_(correction2).sqrt_().add_(options.eps)
        own = local(parameter).mul_(1 - lr * decay)
        own.addcdiv_(exp_avg, denominator, value=-lr / correction1)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments by the name under which a checkpoint keeps them."""
        return {
            f"{moment}.{name}": self.state[parameter][moment]
            for moment in MOMENTS
            for name, parameter in self.named.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # takes moments to their parameter's dtype
        dtype = getattr(torch, self.options.moments)
        for kept in self.state.values():
            kept.update({m: kept[m].to(dtype, copy=True) for m in MOMENTS})
        self.num_steps = state_dict["num_steps"]


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() > 1


def _is_vector(parameter: Tensor) -> bool:
    return not _is_matrix(parameter)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter without a gradient reached the update"
    return local(parameter.grad)
