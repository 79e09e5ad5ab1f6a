"""A forward and a backward pass of an order's pair at the same time (report §3.2.1), through the
hook of torch's runtime.

The forward runs in a thread of its own. While one pass waits for what the dispatcher sends, the
other computes: neither waiting nor a tensor's arithmetic holds Python's lock. The forward is the
pass aside (`aside.py`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed.pipelining.schedules import (
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)

from rorqual.parallel.actions import Action, Kind, Overlapped
from rorqual.parallel.aside import step_aside
from rorqual.parallel.pass_times import PassTimes


class OverlappedPasses:
    """What the runtime calls for a pair: as its own code does for the two in turn."""

    def __init__(self, times: PassTimes) -> None:
        self.times = times
        self.thread = ThreadPoolExecutor(1, "forward", step_aside)

    def __call__(self, action: _Action, context: _PipelineContext) -> None:
        assert action.sub_actions is not None, "a pair has two passes"
        forward, backward = action.sub_actions
        pair = Overlapped(_ours(forward), _ours(backward))
        schedule = context.schedule_ref
        assert isinstance(schedule, _PipelineScheduleRuntime)
        for waiting, part in ((schedule.fwd_recv_ops, forward), (schedule.bwd_recv_ops, backward)):
            _wait_batch_p2p(waiting.pop(_place(part), []))
        self.times.measure(pair, lambda: self._run(forward, backward, schedule, context))

    def _run(
        self,
        forward: _Action,
        backward: _Action,
        schedule: _PipelineScheduleRuntime,
        context: _PipelineContext,
    ) -> None:
        stages: dict[int, Any] = {stage.stage_index: stage for stage in schedule._stages}
        there, back = stages[forward.stage_index], stages[backward.stage_index]
        for stage in (there, back):
            schedule._assert_unsharded(stage)
        (_, coming), (_, going) = _place(forward), _place(backward)
        assert context.arg_mbs is not None
        assert context.kwarg_mbs is not None
        given = context.arg_mbs[coming], context.kwarg_mbs[coming]
        output = self.thread.submit(
            there.forward_one_chunk, coming, *given, save_forward_output=False
        )
        schedule.backward_counter[back.stage_index] += 1
        back.backward_one_chunk(
            going,
            loss=schedule._maybe_get_loss(back, going),
            full_backward=True,
            last_backward=schedule.backward_counter[back.stage_index] == schedule._n_microbatches,
        )
        result = output.result()
        schedule._maybe_compute_loss(there, result, context.target_mbs, coming)
        if (after := stages.get(there.stage_index + 1)) is not None:
            after.set_local_fwd_input(result, coming)
        if (before := stages.get(back.stage_index - 1)) is not None:
            before.set_local_bwd_input(back.get_local_bwd_output(going), going)


def _place(action: _Action) -> tuple[int, int]:
    assert action.microbatch_index is not None, "a pass is of one micro-batch"
    return action.stage_index, action.microbatch_index


def _ours(action: _Action) -> Action:
    return Action(Kind(action.computation_type.value), *_place(action))
