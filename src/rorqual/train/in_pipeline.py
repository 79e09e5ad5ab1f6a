"""Micro-batches through a pipeline: what a rank of it does in place of `step.InTurn`.

Every rank is given the whole batch of its pipeline. What its last stage finds, and what the layers
of all stages counted, is summed, so that each rank has the record of the whole model.
"""

# B sequences, S tokens of a sample, T inputs, D hidden size, L sparse layers, E experts, C = 1 +
# depths, M own figures

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rorqual.errors import TrainingError
from rorqual.model import DeepseekV3
from rorqual.parallel import TimedPipeline, make_orders
from rorqual.parallel.actions import Kind
from rorqual.parallel.pass_times import PassTimes
from rorqual.parallel.stages import (
    EMBEDDING,
    RankStages,
    forward_orders,
    stage_model,
    uses_twice,
)
from rorqual.train.batches import HeldOutPart
from rorqual.train.loss import Coefficients, TrainingModel, balance_seen
from rorqual.train.meters import Laps
from rorqual.train.step import Accumulated

# torch's pipelining takes a second to import, and with it an interrupt before the first step would
# end with another exit code: it is imported where a pipeline begins.
if TYPE_CHECKING:
    from rorqual.parallel.runtime import PipelineRun, Shapes


class StageRoot(nn.Module):
    """A stage as torch's runtime wants it: hidden states or a tuple of tensors, the loss first."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.tied_head: nn.Module | None = None

    def forward(self, x_BTD: Tensor | None = None, **given: Any) -> Tensor | tuple[Tensor, ...]:
        found = self.root(x_BTD, **given)
        if isinstance(found, Tensor):
            return found
        own = () if found.metrics_M is None else (found.metrics_M,)
        return found.total, found.cross_entropy_C, *own


class HeldOutRoot(nn.Module):
    """A stage of `validation.LossesInTurn`: hidden states, or each target's loss."""

    def __init__(self, model: DeepseekV3) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x_BTD: Tensor | None = None,
        *,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        documents_BT: Tensor | None,
    ) -> Tensor | tuple[Tensor]:
        step = self.model.model.step(inputs_BT, documents_BT)
        h_BTD = self.model.hidden(inputs_BT if x_BTD is None else x_BTD, step)
        if self.model.lm_head is None:
            return h_BTD
        return (self.model.token_losses(h_BTD.flatten(0, 1), targets_BT.flatten()),)


class InPipeline:
    """An `Accumulation` over the ranks of a pipeline, of which this one holds `held` in `stages`.

    `roots` are the modules that run, by stage: what shards a model takes hold of them.
    """

    def __init__(
        self,
        held: DeepseekV3,
        stages: RankStages,
        *,
        make_root: Callable[[DeepseekV3], nn.Module] = TrainingModel,
        is_recomputed: bool = False,
        laps: Laps | None = None,
    ) -> None:
        self.laps = laps or Laps()
        self.held, self.group, self.placement = held, stages.group, stages.placement
        self.is_overlapped = stages.is_overlapped
        # Choice: layers that are computed again have whole backward passes. In two parts each part,
        # and in torch's second one each weight, would compute them again.
        self.split = {
            share.index
            for share in stages.shares
            if not (is_recomputed or (share.is_last and uses_twice(held.config)))
        }
        self.stages = {share.index: stage_model(held, share) for share in stages.shares}
        roots = {index: make_root(stage) for index, stage in self.stages.items()}
        self.metric_names: Sequence[str] = getattr(next(iter(roots.values())), "metric_names", ())
        self.roots = {index: StageRoot(root) for index, root in roots.items()}
        if len(roots) > 1 and held.config.tie_word_embeddings and 0 in roots:
            # What shards the first stage, whose embedding this is, then knows of both places.
            self.roots[0].tied_head = held.lm_head
        self.times = PassTimes()
        self._run: tuple[tuple[int, ...], PipelineRun] | None = None
        ends = (0, self.placement.last_rank) if self.placement.has_copy(held.config) else ()
        rank = dist.get_rank(self.group)
        self._copy_peer = ends[rank == 0] if rank in ends else None
        self.copies = frozenset([EMBEDDING] if ends and rank == ends[1] else ())

    def __call__(
        self, micro_batches: Sequence[Mapping[str, Tensor]], by: Coefficients
    ) -> Accumulated:
        run = self._run_for(micro_batches, by)
        balance_seen(self.held)
        results = run([{**given, "by": by} for given in micro_batches])
        self._sum_copies()
        self.laps.lap("micro_batches")
        seen = balance_seen(self.held)
        num_losses = 1 + by.mean_C.numel() + len(self.metric_names)
        losses = torch.zeros(num_losses, dtype=torch.float64, device=self.held.device)
        for result in results:
            losses += torch.cat([part.double().flatten() for part in result])
        balance = (seen.loss * by.balance).double()
        return self._of_all_stages(losses, balance, seen.loads_LE)

    def _of_all_stages(self, losses: Tensor, balance: Tensor, own_LE: Tensor) -> Accumulated:
        """Sums over the ranks, in one message: float64 holds counts exactly."""
        config = self.held.config
        num_layers, num_experts = len(config.sparse_layer_ids), config.n_routed_experts
        loads_LE = losses.new_zeros(num_layers, num_experts)
        for row, own_E in zip(self.held.sparse_rows(), own_LE, strict=True):
            loads_LE[row] = own_E
        both = torch.cat([(losses[:1] + balance), balance[None], losses[1:], loads_LE.flatten()])
        both = self.over_stages(both)
        found, loads = both[: 1 + len(losses)], both[1 + len(losses) :]
        return Accumulated(found.float(), loads.view(num_layers, num_experts).long())

    def over_stages(self, own: Tensor) -> Tensor:
        """The sum over the ranks of the pipeline."""
        values = own.clone()
        dist.all_reduce(values, group=self.group)
        return values

    def begin_timeline(self) -> None:
        """From now on all ranks keep the times of what they run."""
        self.times.begin(self.group)

    def timeline(self) -> TimedPipeline:
        """Of all ranks, since `begin_timeline`, in seconds."""
        return TimedPipeline(self.placement.order, self.times.end(self.group), None)

    def _sum_copies(self) -> None:
        """Both ranks that hold the embedding get the sum of its gradients, to the same bit."""
        if self._copy_peer is None:
            return
        parameter = self.held.get_parameter(EMBEDDING)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        other = torch.empty_like(own)
        peer = dist.get_global_rank(self.group, self._copy_peer)
        sends = [dist.P2POp(dist.isend, own, peer, self.group)]
        sends.append(dist.P2POp(dist.irecv, other, peer, self.group))
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        own += other

    def _run_for(
        self, micro_batches: Sequence[Mapping[str, Tensor]], by: Coefficients
    ) -> PipelineRun:
        """The run for so many micro-batches of this form: batches grow as a training goes on."""
        form = len(micro_batches), *micro_batches[0]["tokens_BS"].shape
        if any(given["tokens_BS"].shape != form[1:] for given in micro_batches):
            raise TrainingError(
                "a pipeline's micro-batches are not equally large",
                found=f"the last of {form[0]} has {len(micro_batches[-1]['tokens_BS'])} samples",
                expected=f"{form[1]} samples each",
                fix="choose batches that training.micro_batch_size divides",
            )
        if self._run is None or self._run[0] != form:
            place = self.placement
            orders = make_orders(place.order, place.num_ranks, form[0], place.num_chunks)
            # Torch's second part of a backward pass takes an operator to have one output, and a
            # fused one would do the work of both parts in each.
            parts = (part for order in orders for action in order for part in action.parts)
            in_parts = {part.stage for part in parts if part.kind is Kind.WEIGHT}
            for index, stage in self.stages.items():
                stage.model.is_fusable = index not in self.split & in_parts
            from rorqual.parallel.runtime import PipelineRun

            run = PipelineRun(
                orders,
                self.roots,
                _shapes(self.held, form, by, len(self.metric_names)),
                group=self.group,
                split=self.split,
                is_overlapped=self.is_overlapped,
                times=self.times,
            )
            self._run = form, run
        return self._run[1]


def _shapes(held: DeepseekV3, form: tuple[int, ...], by: Coefficients, num_metrics: int) -> Shapes:
    num_depths = by.mean_C.numel()
    with torch.device("meta"):
        hidden_BTD = torch.empty(
            form[1], form[2] - num_depths, held.config.hidden_size, dtype=held.dtype
        )
        results = [torch.empty((), requires_grad=True), torch.empty(num_depths)]
        if num_metrics:
            results.append(torch.empty(num_metrics))
    from rorqual.parallel.runtime import Shapes

    return Shapes(hidden_BTD.requires_grad_(), tuple(results))


class LossesInPipeline:
    """`TokenLosses` of the model that the ranks of `pipeline` hold; each rank is told all."""

    def __init__(self, pipeline: InPipeline) -> None:
        self.pipeline = pipeline
        # Enough that all stages are busy most of the time.
        self.num_together = 4 * pipeline.placement.num_ranks

    def __call__(self, parts: Sequence[HeldOutPart]) -> list[Tensor]:
        pipeline, device = self.pipeline, self.pipeline.held.device
        hidden_BTD = torch.empty(
            *parts[0].inputs_BT.shape,
            pipeline.held.config.hidden_size,
            dtype=pipeline.held.dtype,
            device="meta",
        )
        losses_PN = torch.zeros(len(parts), parts[0].inputs_BT.numel(), device=device)
        from rorqual.parallel.runtime import ForwardRun, Shapes

        run = ForwardRun(
            forward_orders(pipeline.placement, len(parts)),
            {index: HeldOutRoot(stage) for index, stage in pipeline.stages.items()},
            Shapes(hidden_BTD, (losses_PN[0].to("meta"),)),
            group=pipeline.group,
        )
        found = run([_on(device, part) for part in parts])
        for row, (losses_N,) in zip(losses_PN, found, strict=False):
            row.copy_(losses_N)
        dist.all_reduce(losses_PN, group=pipeline.group)
        return list(losses_PN)


def _on(device: torch.device, part: HeldOutPart) -> dict[str, Tensor | None]:
    documents_BT = part.documents_BT
    return {
        "inputs_BT": part.inputs_BT.to(device),
        "targets_BT": part.targets_BT.to(device),
        "documents_BT": None if documents_BT is None else documents_BT.to(device),
    }
