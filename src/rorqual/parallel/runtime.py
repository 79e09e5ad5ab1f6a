"""Runs a rank's order of passes on torch's own pipeline runtime (torch.distributed.pipelining).

The orders are ours (`orders.py`), their words torch's; sends and receives are put in by torch. Its
schedules split a batch and learn shapes by running a step for nothing: here micro-batches come as
they are, and the shapes are given.
"""

# B sequences of a micro-batch, T inputs, D hidden size

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    OVERLAP_F_B,
    _Action,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo

from rorqual.parallel.actions import Action, Kind, Order, stages_of
from rorqual.parallel.overlap import OverlappedPasses
from rorqual.parallel.pass_times import PassTimes

FORWARD_ACTIONS = ("F", "SEND_F", "RECV_F")


@dataclass(frozen=True)
class Shapes:
    """What goes from stage to stage, and what the last one returns; on the device meta."""

    hidden_BTD: Tensor
    results: tuple[Tensor, ...]


class Stage(PipelineStage):
    """A stage that keeps the times of what it runs. With `is_split` a backward pass has two parts
    where the order has them; otherwise the first one is the whole pass, and nothing is left.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        shapes: Shapes,
        *,
        group: dist.ProcessGroup,
        is_split: bool,
        times: PassTimes,
    ) -> None:
        device = next(module.parameters()).device
        hidden, is_last = (shapes.hidden_BTD,), index == num_stages - 1
        super().__init__(
            module,
            index,
            num_stages,
            device,
            input_args=hidden if index else (),
            output_args=shapes.results if is_last else hidden,
            group=group,
            dw_builder=None if is_split else _nothing_left,
        )
        self.times = times

    def _setup_forward_recv_info(self, *numbers: Any) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(*numbers)

    def _setup_backward_recv_info(self, *numbers: Any) -> None:
        with self._without_memory():
            super()._setup_backward_recv_info(*numbers)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """torch would keep room for all micro-batches of a step, from the first one to the end."""
        self.device, own = torch.device("meta"), self.device
        try:
            yield
        finally:
            self.device = own

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_room(self, infos: tuple[_RecvInfo, ...]) -> None:
        for info in infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=False)

    def _let_go(self, infos: tuple[_RecvInfo, ...]) -> None:
        for info in infos:
            if info.buffer is not None:
                info.buffer = info.buffer.detach().to("meta")

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **options: Any) -> Any:
        run = super().forward_one_chunk
        action = Action(Kind.FORWARD, self.stage_index, fwd_chunk_id)
        return self.times.measure(action, lambda: run(fwd_chunk_id, *rest, **options))

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        run = super().backward_one_chunk
        kind = Kind.BACKWARD if full_backward else Kind.INPUT
        self.times.measure(
            Action(kind, self.stage_index, bwd_chunk_id),
            lambda: run(bwd_chunk_id, loss, full_backward, last_backward),
        )
        if self.has_backward:
            self._let_go(self.args_recv_info[bwd_chunk_id])
            self._let_go(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        run = super().backward_weight_one_chunk
        action = Action(Kind.WEIGHT, self.stage_index, bwd_chunk_id)
        self.times.measure(action, lambda: run(bwd_chunk_id, last_backward))


def _nothing_left() -> Callable[[], None]:
    return lambda: None


class PipelineRun:
    """run(micro_batches) -> what the last stage returned for each, on the rank that has it, and an
    empty list elsewhere.

    `modules` are this rank's stages by number. Each is given a micro-batch's arguments by name, and
    all but the first the hidden states of the stage before by position. The last returns a tuple of
    tensors, the first of which is the loss. `split` are the stages whose backward passes have two
    parts. With `is_overlapped` the pairs of an order run together, otherwise one after the other.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        modules: Mapping[int, nn.Module],
        shapes: Shapes,
        *,
        group: dist.ProcessGroup,
        split: Collection[int] = (),
        is_overlapped: bool = False,
        times: PassTimes | None = None,
    ) -> None:
        times = times or PassTimes()
        num_stages = 1 + max(stage for order in orders for stage in stages_of(order))
        self.num_micro_batches = 1 + max(
            part.micro_batch for action in orders[0] for part in action.parts
        )
        self.results: list[tuple[Tensor, ...]] = []
        self.stages = [
            Stage(
                module,
                index,
                num_stages,
                shapes,
                group=group,
                is_split=index in split,
                times=times,
            )
            for index, module in sorted(modules.items())
        ]
        self.schedule = _PipelineScheduleRuntime(
            self.stages, self.num_micro_batches, loss_fn=self._keep, scale_grads=False
        )
        actions = {
            rank: [_Action.from_str(str(action)) for action in order]
            for rank, order in enumerate(orders)
        }
        self.schedule._prepare_schedule_with_comms(actions)
        if is_overlapped:
            self.schedule.register_custom_function(OVERLAP_F_B, OverlappedPasses(times))

    def __call__(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, ...]]:
        self.results = []
        for stage in self.stages:
            stage.has_backward = self.schedule._has_backward
            stage.clear_runtime_states()
        number = self.num_micro_batches
        self.schedule._step_microbatches(
            [()] * number,
            [dict(given) for given in micro_batches],
            [None] * number,
            return_outputs=False,
        )
        return self.results

    def _keep(self, results: tuple[Tensor, ...], _target: None) -> Tensor:
        self.results.append(tuple(result.detach() for result in results))
        return results[0]


class ForwardRun(PipelineRun):
    """The forward passes of an order alone; what the last stage returns may be anything."""

    def __init__(self, *orders_and_modules: Any, **options: Any) -> None:
        super().__init__(*orders_and_modules, **options)
        self.schedule._has_backward = False
        whole = self.schedule.pipeline_order_with_comms
        self.schedule.pipeline_order_with_comms = {
            rank: _forwards(order) for rank, order in whole.items()
        }


def _forwards(actions: Sequence[_Action]) -> list[_Action]:
    """The forward passes, and what is sent and received for them."""
    flat = [part for action in actions for part in action.sub_actions or (action,)]
    return [action for action in flat if action.computation_type.value in FORWARD_ACTIONS]
