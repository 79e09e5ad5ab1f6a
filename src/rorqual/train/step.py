"""One optimiser step: micro-batches accumulate, then clip, update, move the router bias.

The coefficients of the loss are known before the first micro-batch, so the sum of the micro-batches
equals one large batch. The host waits for the device once: `_read` takes all of a step's numbers in
one copy, before the update, since a step that is not finite must move nothing.
"""

# B sequences, S tokens of a sample, L sparse layers, E experts, C = 1 + depths, M own figures

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rorqual.errors import TrainingError
from rorqual.model import DeepseekV3
from rorqual.train import router_bias
from rorqual.train.loss import (
    Coefficients,
    LossParts,
    TrainingModel,
    balance_seen,
    coefficients,
    target_counts,
)
from rorqual.train.meters import Laps
from rorqual.train.optimizer import AdamW
from rorqual.train.precision import compute_in
from rorqual.train.ranks import OneRank, Ranks, Spread, Whole


class StepValues(NamedTuple):
    """What the recipe says for one step: rate, lambda, alpha, gamma."""

    lr: float
    mtp_weight: float
    balance_alpha: float
    bias_update_speed: float


@dataclass(frozen=True)
class StepResult:
    """A step's record: means over the batch, and the load of each expert in each sparse layer, on
    the host. `metrics` are the stage's own figures by name.
    """

    loss: float
    main: float
    mtp: list[float]
    balance: float
    grad_norm: float
    num_targets: int
    loads_LE: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Accumulated(NamedTuple):
    """What a batch's micro-batches gave beside their gradients; on the device.

    `losses`: total, balance loss, main model, each MTP depth, own figures; (2 + C + M,).
    """

    losses: Tensor
    loads_LE: Tensor


class Accumulation(Protocol):
    """Runs the micro-batches of a batch, each by the names of the root's arguments, and leaves the
    sum of their gradients in the parameters. `copies` names those that another rank has too, with
    the same gradient, and counts in the norm. It tells the run's `Laps` of its phases.
    """

    metric_names: Sequence[str]
    copies: frozenset[str]

    def __call__(
        self, micro_batches: Sequence[Mapping[str, Tensor]], by: Coefficients
    ) -> Accumulated: ...


class MicroBatch(NamedTuple):
    """What one micro-batch adds to the step's record; on the device."""

    total: Tensor
    cross_entropy_C: Tensor
    metrics_M: Tensor
    balance: Tensor
    loads_LE: Tensor


class InTurn:
    """One micro-batch after the other, forward and backward. `root` gives the loss,
    `TrainingModel(model)` if left out; `spread` is what ranks share of both.

    `use_compile` turns the loss of one micro-batch (fixed shapes) into one graph; the grouped GEMM
    and the cross entropy are opaque operators in it.
    """

    def __init__(
        self,
        model: DeepseekV3,
        root: nn.Module | None = None,
        *,
        use_compile: bool = False,
        laps: Laps | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.model, self.laps, self.spread = model, laps or Laps(), spread or Whole()
        root = root or TrainingModel(model)
        self.metric_names: Sequence[str] = getattr(root, "metric_names", ())
        self.copies: frozenset[str] = frozenset()
        self.loss: Callable[..., LossParts]
        self.loss = torch.compile(root) if use_compile else root

    def __call__(
        self, micro_batches: Sequence[Mapping[str, Tensor]], by: Coefficients
    ) -> Accumulated:
        parts = []
        for number, given in enumerate(micro_batches, 1):
            self.spread.micro_batch(is_last=number == len(micro_batches))
            parts.append(self._accumulate(given, by))
        losses = [torch.stack([part.total for part in parts]).sum()[None]]
        losses.append(torch.stack([part.balance for part in parts]).sum()[None])
        losses.append(torch.stack([part.cross_entropy_C for part in parts]).sum(0))
        losses.append(torch.stack([part.metrics_M for part in parts]).sum(0))
        loads_LE = torch.stack([part.loads_LE for part in parts]).sum(0)
        return Accumulated(torch.cat(losses), loads_LE)

    def _accumulate(self, given: Mapping[str, Tensor], by: Coefficients) -> MicroBatch:
        parts = self.loss(**given, by=by)
        self.laps.lap("forward")
        parts.total.backward()
        self.laps.lap("backward")
        loads_LE, loss = balance_seen(self.model)
        balance_loss = loss * by.balance
        total = parts.total.detach() + balance_loss
        own_M = parts.metrics_M if parts.metrics_M is not None else total.new_zeros(0)
        assert own_M.shape == (len(self.metric_names),), "each name in metric_names has its figure"
        return MicroBatch(total, parts.cross_entropy_C, own_M.detach(), balance_loss, loads_LE)


class Stepper:
    """step(tokens_BS, mask_BS, values, documents_BS, extras) moves the model once.

    `documents_BS` numbers packed documents (0 for padding), of which none sees another. What gives
    the loss gets its rows of `extras` by name. `accumulate` runs the micro-batches,
    `InTurn(model)` if left out.
    """

    def __init__(
        self,
        model: DeepseekV3,
        optimizer: AdamW,
        accumulate: Accumulation | None = None,
        *,
        micro_batch_size: int,
        precision: str = "float32",
        ranks: Ranks | None = None,
        laps: Laps | None = None,
    ) -> None:
        self.model, self.optimizer, self.laps = model, optimizer, laps or Laps()
        self.ranks = ranks or OneRank()
        self.micro_batch_size = micro_batch_size
        compute_in(model, precision)
        self.accumulate = accumulate or InTurn(model)

    def step(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor,
        values: StepValues,
        documents_BS: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> StepResult:
        """Accumulates, clips, updates weights and router bias; TrainingError if not finite.

        On the error nothing has moved: weights, moments and bias are those of the step before.
        """
        num_depths = self.model.config.num_nextn_predict_layers
        counts_C = self.ranks.sum(target_counts(mask_BS, num_depths, documents_BS))
        num_sequences = tokens_BS.shape[0] * self.ranks.num_replicas
        by = coefficients(counts_C, num_sequences, values.mtp_weight, values.balance_alpha)
        self.optimizer.zero_grad()
        for layer in self.model.sparse_layers():
            layer.balance.reset()  # a step that failed may have left something
        size = self.micro_batch_size
        given = {"tokens_BS": tokens_BS, "mask_BS": mask_BS, **(extras or {})}
        if documents_BS is not None:
            given["documents_BS"] = documents_BS
        ran = self.accumulate(
            [
                {name: rows[start : start + size] for name, rows in given.items()}
                for start in range(0, tokens_BS.shape[0], size)
            ],
            by,
        )
        losses, loads_LE = self.ranks.sum(ran.losses), self.ranks.sum(ran.loads_LE)
        norm = self.optimizer.clip(self.ranks.norm)
        result = _read(losses, loads_LE, norm, counts_C, self.accumulate.metric_names)
        self.laps.lap("clip")
        _check_finite(result)
        self.optimizer.set_lr(values.lr)
        self.optimizer.step()
        own = [loads_LE[row] for row in self.model.sparse_rows()]
        router_bias.update_bias(self.model.routers(), own, values.bias_update_speed)
        self.laps.lap("optimizer")
        return result


def _read(
    losses: Tensor, loads_LE: Tensor, grad_norm: Tensor, counts_C: Tensor, names: Sequence[str]
) -> StepResult:
    """The step's record on the host, by one copy: float64 holds all of it exactly.

    `losses`: the total, the balance loss, the cross entropies of main model and depths, and the
    figures of these names.
    """
    numbers = [losses, grad_norm[None], counts_C[:1], loads_LE.flatten()]
    read = torch.cat([number.double() for number in numbers]).tolist()
    (loss, balance_loss, *means), rest = read[: len(losses)], read[len(losses) :]
    losses_C, own_M = means[: counts_C.numel()], means[counts_C.numel() :]
    norm, num_targets, *loads = rest
    return StepResult(
        loss=loss,
        main=losses_C[0],
        mtp=losses_C[1:],
        balance=balance_loss,
        grad_norm=norm,
        num_targets=int(num_targets),
        loads_LE=torch.tensor(loads, dtype=torch.int64).view(loads_LE.shape),
        metrics=dict(zip(names, own_M, strict=True)),
    )


class NotFinite(TrainingError):  # noqa: N818  it says what is, as EngineFailed does
    """A step whose loss or gradient is not finite; it has moved nothing."""


def _check_finite(result: StepResult) -> None:
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise NotFinite(
            "the loss or the gradient is not finite; the weights were not moved",
            found=f"loss {result.loss}, gradient norm {result.grad_norm}",
            expected="finite numbers",
            fix="lower lr_schedule.peak, lengthen lr_schedule.warmup, or use float32",
        )
