"""The orders by name, for all ranks of a pipeline, and what the report's Table 2 says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rorqual.errors import UsageError
from rorqual.parallel import orders
from rorqual.parallel.actions import Order, stages_of
from rorqual.parallel.simulator import Durations, Timeline, simulate

PIPELINE_ORDERS: dict[str, Callable[[int, int, int], Order]] = {
    "1f1b": orders.one_f_one_b,
    "interleaved": orders.interleaved,
    "zb1p": orders.zb1p,
    "zbv": orders.zbv,
    "dualpipev": orders.dualpipev,
    "dualpipe": orders.dualpipe,
}
MAX_PASSES = 200_000
"""Forwards of a step, of all stages: more take minutes and gigabytes to simulate."""
ROUNDING = 1e-9  # two durations that differ by less are equal


def make_orders(
    name: str, num_ranks: int, num_micro_batches: int, num_chunks: int | None = None
) -> list[Order]:
    """The order of each rank. `num_chunks`, how many stages a rank has, is for `interleaved` alone,
    which has 2 otherwise.
    """
    make = PIPELINE_ORDERS.get(name)
    if make is None:
        raise UsageError(
            "no such pipeline order", found=name, expected=f"one of {', '.join(PIPELINE_ORDERS)}"
        )
    if num_chunks is not None:
        if name != "interleaved":
            raise UsageError(
                "only interleaved lets one choose how many stages a rank has",
                found=f"{num_chunks} chunks for {name}",
                fix="leave it out",
            )
        make = partial(orders.interleaved, num_chunks=num_chunks)
    num_passes = num_ranks * num_micro_batches * (num_chunks or 1)
    if num_passes > MAX_PASSES:
        raise UsageError(
            "too many passes to simulate",
            found=f"{num_passes:,} forwards",
            expected=f"at most {MAX_PASSES:,}: ranks times micro-batches times chunks",
            fix="take fewer: an order repeats itself",
        )
    return [make(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]


@dataclass(frozen=True)
class ClosedForm:
    """A bubble of the report's Table 2: that of the rank that waits longest."""

    formula: str
    bubble: float
    assumption: str  # under which the order really takes this long, found by simulation
    is_met: bool


def closed_form(name: str, num_ranks: int, durations: Durations) -> ClosedForm | None:
    """Table 2's line, for `durations` of a stage, or None where it has none.

    Its PP counts the stages of the model: as many as ranks in DualPipe, 2 * num_ranks in DualPipeV.
    """
    forward, backward, weight = durations.forward, durations.backward, durations.backward_weight
    is_direct = durations.send == 0
    if name == "1f1b":
        bubble = (num_ranks - 1) * (forward + backward)
        return ClosedForm("(PP-1)(F+B)", bubble, "no sends", is_direct)
    if name == "zb1p":
        bubble = (num_ranks - 1) * (forward + backward - 2 * weight)
        is_met = is_direct and _is_at_most(weight, min(forward, durations.backward_input))
        return ClosedForm("(PP-1)(F+B-2W)", bubble, "W <= F, W <= B-W, no sends", is_met)
    if name in ("dualpipe", "dualpipev"):
        half = num_ranks // 2 if name == "dualpipe" else num_ranks
        bubble = (half - 1) * (durations.pair + backward - 3 * weight)
        is_even = math.isclose(forward, durations.backward_input, rel_tol=ROUNDING)
        is_met = is_direct and is_even and _is_at_most(weight, forward)
        return ClosedForm("(PP/2-1)(F&B+B-3W)", bubble, "F = B-W >= W, no sends", is_met)
    return None


def _is_at_most(value: float, limit: float) -> bool:
    return value <= limit or math.isclose(value, limit, rel_tol=ROUNDING)


@dataclass(frozen=True)
class TimedPipeline:
    """An order on so many ranks and when it ran, simulated or measured. What is counted is in
    shares of the model that orders of any number of stages have in common: 1 is one
    `num_ranks`-th of its layers.
    """

    name: str
    timeline: Timeline
    table_2: ClosedForm | None

    @property
    def bubble(self) -> float:
        """Of the rank that waits longest."""
        return max(self.timeline.bubbles)

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.timeline.end

    @property
    def parameters(self) -> float:
        """Of the rank that holds most of them: 2 where the model is there twice."""
        return max(self.timeline.stages) * self._share

    @property
    def activations(self) -> float:
        """Of the rank that holds most: micro-batches."""
        return max(self.timeline.activations) * self._share

    @property
    def _share(self) -> float:
        return len(self.timeline.ranks) / self.timeline.num_stages

    def with_intervals(self) -> dict[str, Any]:
        """`as_dict`, and each start and end: what `rorqual pipeline ORDER --json` prints."""
        intervals = [
            [{"action": str(each.action), "start": each.start, "end": each.end} for each in own]
            for own in self.timeline.ranks
        ]
        return {**self.as_dict(), "timeline": intervals}

    def as_dict(self) -> dict[str, Any]:
        reported = self.table_2
        return {
            "order": self.name,
            "end": self.timeline.end,
            "bubble": self.bubble,
            "bubble_share": self.bubble_share,
            "bubbles": self.timeline.bubbles,
            "parameters": self.parameters,
            "activations": self.activations,
            "num_stages": self.timeline.num_stages,
            "stages": self.timeline.stages,
            "stage_activations": self.timeline.activations,
            "table_2": None if reported is None else asdict(reported),
        }


def simulate_pipeline(
    name: str,
    num_ranks: int,
    num_micro_batches: int,
    durations: Durations,
    num_chunks: int | None = None,
) -> TimedPipeline:
    """`durations` are those of one `num_ranks`-th of the layers; a stage of half of that takes
    half.
    """
    of_ranks = make_orders(name, num_ranks, num_micro_batches, num_chunks)
    num_stages = len({stage for order in of_ranks for stage in stages_of(order)})
    of_stage = durations.scaled(num_ranks / num_stages)
    return TimedPipeline(name, simulate(of_ranks, of_stage), closed_form(name, num_ranks, of_stage))
