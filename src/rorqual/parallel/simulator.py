"""When each rank of a pipeline does what, from its order and from how long each pass takes.

A rank runs its order one action after the other. A forward needs the stage before, a backward the
stage behind and its own forward, a weight gradient its input gradient; what another rank made
arrives `send` later, and sending takes no time of the ranks. So the figures are those of the
report's Table 2, which counts no sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rorqual.config import settings
from rorqual.errors import MAX_LISTED, UsageError
from rorqual.parallel.actions import Action, Kind, Overlapped, most_activations, stages_of

SHORTEST, LONGEST = 1e-9, 1e9  # so that no sum or share of them is lost or infinite


@settings
class Durations:
    """How long one micro-batch takes in one stage, in any one unit of time."""

    forward: float = 1.0
    backward: float = 2.0  # whole
    backward_weight: float = 1.0  # the part of it that gives the weights their gradients
    # A forward and a whole backward together; None: as long as one after the other.
    overlapped: float | None = None
    send: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "send" else SHORTEST
            if value is not None and not least <= value <= LONGEST:
                raise UsageError(
                    f"{name} is no duration", found=value, expected=f"{least:g} to {LONGEST:g}"
                )
        if self.backward_weight >= self.backward:
            raise UsageError(
                "backward_weight takes as long as the backward pass that it is a part of",
                found=f"backward_weight {self.backward_weight:g}, backward {self.backward:g}",
                expected="less",
            )
        if self.pair < max(self.forward, self.backward):
            raise UsageError(
                "overlapped takes less time than the longer of its two passes alone",
                found=self.pair,
                expected=f"{max(self.forward, self.backward):g} or more",
            )

    @property
    def backward_input(self) -> float:
        return self.backward - self.backward_weight

    @property
    def pair(self) -> float:
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def of(self, action: Action | Overlapped) -> float:
        if isinstance(action, Overlapped):
            return self.pair
        by_kind = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT: self.backward_input,
            Kind.WEIGHT: self.backward_weight,
        }
        return by_kind[action.kind]

    def scaled(self, share: float) -> Durations:
        """Those of a stage of this share of the layers. What is sent stays the same."""
        return replace(
            self,
            forward=self.forward * share,
            backward=self.backward * share,
            backward_weight=self.backward_weight * share,
            overlapped=self.pair * share,
        )


@dataclass(frozen=True)
class Interval:
    """An action and when a rank ran it."""

    action: Action | Overlapped
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each rank runs when, `ranks[rank]` in order; time begins at 0."""

    ranks: tuple[tuple[Interval, ...], ...]

    @property
    def end(self) -> float:
        return max((own[-1].end for own in self.ranks if own), default=0.0)

    @property
    def bubbles(self) -> list[float]:
        """How long each rank does nothing until the last one has ended: the optimizer's step waits
        for all.
        """
        return [self.end - sum(each.end - each.start for each in own) for own in self.ranks]

    @property
    def stages(self) -> list[int]:
        """How many stages' parameters each rank holds."""
        return [len(stages_of(order)) for order in self._orders]

    @property
    def activations(self) -> list[int]:
        """How many activations each rank holds at most: `most_activations`."""
        return [most_activations(order) for order in self._orders]

    @property
    def num_stages(self) -> int:
        return len({stage for order in self._orders for stage in stages_of(order)})

    @property
    def _orders(self) -> list[list[Action | Overlapped]]:
        return [[each.action for each in own] for own in self.ranks]


def simulate(orders: Sequence[Sequence[Action | Overlapped]], durations: Durations) -> Timeline:
    """`orders[rank]` is what this rank runs. UsageError where ranks would wait for ever, or
    something is run twice.
    """
    makers = _makers(orders)
    last_stage = max((action.stage for action in makers), default=0)
    ended: dict[Action, float] = {}
    ranks: list[list[Interval]] = [[] for _ in orders]
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, (order, own) in enumerate(zip(orders, ranks, strict=True)):
            while len(own) < len(order):
                action = order[len(own)]
                needed = _needed(action, last_stage)
                if not all(each in ended for each in needed):
                    break
                ready = [
                    ended[each] + (durations.send if makers[each] != rank else 0.0)
                    for each in needed
                ]
                start = max([own[-1].end if own else 0.0, *ready])
                own.append(Interval(action, start, start + durations.of(action)))
                ended.update((made, own[-1].end) for made in _made(action))
                is_moving = True
    if any(len(own) < len(order) for order, own in zip(orders, ranks, strict=True)):
        raise _deadlock(orders, [len(own) for own in ranks], set(ended), last_stage)
    return Timeline(tuple(tuple(own) for own in ranks))


def _made(action: Action | Overlapped) -> list[Action]:
    """What others may wait for: a whole backward gives what its two parts give."""
    made = []
    for part in action.parts:
        is_whole = part.kind == Kind.BACKWARD
        kinds = (Kind.INPUT, Kind.WEIGHT) if is_whole else (part.kind,)
        made += [replace(part, kind=kind) for kind in kinds]
    return made


def _needed(action: Action | Overlapped, last_stage: int) -> list[Action]:
    """What must have been made before, in the words of `_made`."""
    needed = []
    for part in action.parts:
        if part.kind == Kind.FORWARD:
            if part.stage > 0:
                needed.append(replace(part, stage=part.stage - 1))
        elif part.kind == Kind.WEIGHT:
            needed.append(replace(part, kind=Kind.INPUT))
        else:
            needed.append(replace(part, kind=Kind.FORWARD))
            if part.stage < last_stage:
                needed.append(replace(part, kind=Kind.INPUT, stage=part.stage + 1))
    return needed


def _makers(orders: Sequence[Sequence[Action | Overlapped]]) -> dict[Action, int]:
    """Which rank makes what."""
    makers: dict[Action, int] = {}
    for rank, order in enumerate(orders):
        for action in order:
            for made in _made(action):
                if made in makers:
                    raise UsageError(
                        f"{made} is made twice",
                        where=f"rank {rank}",
                        found=f"by {action}, and before by rank {makers[made]}",
                        expected="each pass of each micro-batch once",
                    )
                makers[made] = rank
    return makers


def _deadlock(
    orders: Sequence[Sequence[Action | Overlapped]],
    places: Sequence[int],
    ended: set[Action],
    last_stage: int,
) -> UsageError:
    makers, waiting = _makers(orders), []
    for rank, (order, place) in enumerate(zip(orders, places, strict=True)):
        if place < len(order):
            missing = next(m for m in _needed(order[place], last_stage) if m not in ended)
            maker = f"of rank {makers[missing]}" if missing in makers else "which no rank runs"
            waiting.append(f"rank {rank} before {order[place]} for {missing}, {maker}")
    listed = "; ".join(waiting[:MAX_LISTED])
    more = len(waiting) - MAX_LISTED
    return UsageError(
        "a deadlock: ranks of the pipeline wait for ever",
        found=listed + (f"; and {more} more" if more > 0 else ""),
        expected="orders in which what is waited for comes before what waits",
    )
