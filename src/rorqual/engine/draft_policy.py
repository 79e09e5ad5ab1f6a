"""How many tokens to draft: as many as pay, measured while the engine runs.

Drafts save steps and make each one dearer; which weighs more depends on the model, the
machine, how many answers run and how predictable they are. So the policy compares expected tokens a
second,

    (1 + a_1 + a_1 a_2 + ... + a_1 ... a_k) / seconds of a step with k drafts,

a_j being how often draft j is right where those before it were. Costs are only ever compared side
by side: now and then a *trial* runs a few steps with another k, and the ratio to the steps just
before it counts. So a text that grows, or a machine that others slow down, does not change the
result. Ratios are kept by the number of answers in powers of two. (What that means for the text:
`Engine`.)

At the start nothing is known. One draft is tried at once; more, and what was measured badly, only
where it would pay by what is known so far, each draft taken to cost as much as the one before. A
trial ends as soon as it shows that it cannot pay: a model whose drafts are never right loses a few
steps, and looks again when these weigh little.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

WINDOW = 4
"""Steps on either side of a comparison; their median counts, so that one slow step does not."""
MAX_TRIAL_STEPS = 4 * WINDOW
"""A trial that prompts interrupt too often is given up."""
TRIAL_SHARE = 0.02
"""Of the time of all steps, what trials may take, but for the first ones that promise something."""
FREE_TRIALS = 3
"""Of each number of drafts, while they promise something."""
MARGIN = 1.1
"""What promises something may be worse than what is in use by that factor: measures are rough."""
TRIAL_WEIGHT = 0.5
"""Of a new ratio beside those before it."""
PRIOR_ACCEPTANCE, PRIOR_COUNT = 0.85, 3
"""§5.4.3: 85 to 90 %. Weighs as `PRIOR_COUNT` drafts, so that a few wrong ones at first decide
nothing."""
MIN_WEIGHT = 0.01
"""Of a new draft among those seen: the last hundred count most."""


@dataclass(frozen=True)
class Outcome:
    """What one answer made of a step: drafts that were wanted for it, and how many were right."""

    num_wanted: int
    num_accepted: int


class DraftPolicy(Protocol):
    """Asked at the beginning of each step, told at its end."""

    @property
    def num_drafts(self) -> int:
        """How many were chosen last, outside trials."""
        ...

    def begin(self, num_answers: int) -> int:
        """How many tokens to draft for each of the answers that need their next token."""
        ...

    def end(self, outcomes: Sequence[Outcome], *, is_decode: bool) -> None:
        """The step is done; `is_decode`: no prompt ran in it."""
        ...


@dataclass(frozen=True)
class FixedDrafts:
    """The same number in every step, whether it pays or not."""

    num_drafts: int

    def begin(self, num_answers: int) -> int:
        return self.num_drafts

    def end(self, outcomes: Sequence[Outcome], *, is_decode: bool) -> None:
        pass


@dataclass
class _Trial:
    num_drafts: int
    num_steps: int = 0
    seconds: list[float] = field(default_factory=list)


class PayingDrafts:
    """At most `max_drafts`; `clock` gives seconds."""

    def __init__(self, max_drafts: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_drafts = 0
        self._max_drafts, self._clock = max_drafts, clock
        self._acceptance = [PRIOR_ACCEPTANCE] * max_drafts
        self._num_seen = [PRIOR_COUNT] * max_drafts
        # (size of the batch, drafts) -> seconds of a step over those of one without drafts
        self._ratios: dict[tuple[int, int], float] = {}
        self._nearest: dict[int, list[float | None]] = {}  # what `_ratio` says of each size
        self._last_trial: dict[tuple[int, int], int] = {}
        self._num_tried = [0] * (max_drafts + 1)
        self._seconds = self._trial_seconds = self._since = 0.0
        self._size = 0
        self._beside: deque[float] = deque(maxlen=WINDOW)
        self._trial: _Trial | None = None

    def begin(self, num_answers: int) -> int:
        self._since = self._clock()
        if not num_answers or not self._max_drafts:
            return 0
        size = num_answers.bit_length()
        best = self._best(size)
        if (size, best) != (self._size, self.num_drafts):
            self._size, self.num_drafts = size, best
            self._beside.clear()
            self._trial = None
        elif self._trial is None and len(self._beside) == WINDOW:
            others = [k for k in range(self._max_drafts + 1) if k != best]
            if self._trial_seconds > TRIAL_SHARE * self._seconds:
                others = [k for k in others if self._is_free(k)]
            if others:
                stalest = min(others, key=lambda k: self._last_trial.get((size, k), -1))
                self._last_trial[size, stalest] = sum(self._num_tried)
                self._num_tried[stalest] += 1
                self._trial = _Trial(stalest)
        return self.num_drafts if self._trial is None else self._trial.num_drafts

    def end(self, outcomes: Sequence[Outcome], *, is_decode: bool) -> None:
        if not outcomes or not self._max_drafts:
            return
        seconds = self._clock() - self._since
        self._seconds += seconds
        for outcome in outcomes:
            self._note(outcome)
        used = self.num_drafts if self._trial is None else self._trial.num_drafts
        # A step unlike the others is no measure of them.
        is_measure = is_decode and all(outcome.num_wanted == used for outcome in outcomes)
        if self._trial is not None:
            self._trial_seconds += seconds
            self._go_on(self._trial, seconds, is_measure=is_measure)
        elif is_measure:
            self._beside.append(seconds)

    def _go_on(self, trial: _Trial, seconds: float, *, is_measure: bool) -> None:
        trial.num_steps += 1
        if is_measure:
            trial.seconds.append(seconds)
        measured = trial.seconds[1:]  # the first one had to catch up with the text
        ratio = median(measured or [0.0]) / median(self._beside)
        used = self._ratio(self._size, self.num_drafts) or 1.0
        is_vain = len(measured) > 1 and not self._promises(trial.num_drafts, used * ratio)
        if len(measured) == WINDOW or is_vain:
            self._learn(trial.num_drafts, ratio)
            self._trial = None
        elif trial.num_steps >= MAX_TRIAL_STEPS:
            self._trial = None
            self._beside.clear()

    def _best(self, size: int) -> int:
        """With how many drafts a step gives most tokens for its cost, of what was tried."""
        if size not in self._nearest:
            numbers = range(1, self._max_drafts + 1)
            self._nearest[size] = [self._ratio(size, number) for number in numbers]
        best, most, tokens, chance = 0, 1.0, 1.0, 1.0
        for number, ratio in enumerate(self._nearest[size], 1):
            chance *= self._acceptance[number - 1]
            tokens += chance
            if ratio is not None and tokens / ratio > most:
                best, most = number, tokens / ratio
        return best

    def _tokens(self, num_drafts: int) -> float:
        """Of a step, as expected."""
        tokens = chance = 1.0
        for share in self._acceptance[:num_drafts]:
            chance *= share
            tokens += chance
        return tokens

    def _ratio(self, size: int, num_drafts: int) -> float | None:
        """As measured with `num_answers`, or with the number nearest to it."""
        if num_drafts == 0:
            return 1.0
        sizes = [known for known, k in self._ratios if k == num_drafts]
        nearest = min(sizes, key=lambda known: abs(known - size), default=None)
        return None if nearest is None else self._ratios[nearest, num_drafts]

    def _is_free(self, num_drafts: int) -> bool:
        """Whether to try these at once."""
        if self._num_tried[num_drafts] >= FREE_TRIALS:
            return False
        ratio = self._ratio(self._size, num_drafts) or self._guessed_ratio(num_drafts)
        return self._promises(num_drafts, ratio)

    def _promises(self, num_drafts: int, ratio: float) -> bool:
        """Whether they may pay better than the number in use, if a step costs so much."""
        used = self._tokens(self.num_drafts) / (self._ratio(self._size, self.num_drafts) or 1.0)
        return MARGIN * self._tokens(num_drafts) > used * ratio

    def _guessed_ratio(self, num_drafts: int) -> float:
        """From the nearest fewer drafts that were tried: each costs as much as these did."""
        for fewer in range(num_drafts - 1, 0, -1):
            if (ratio := self._ratio(self._size, fewer)) is not None:
                return 1 + (ratio - 1) * num_drafts / fewer
        return 1.0

    def _learn(self, tried: int, ratio: float) -> None:
        """`ratio`: seconds with `tried` drafts over those with the number in use."""
        used = self._ratio(self._size, self.num_drafts)
        assert used is not None, "what is in use was tried"
        # Without drafts the ratio is 1 by definition: then it is the other one that has moved.
        key = (self._size, tried or self.num_drafts)
        # No draft is free: what looks so was measured beside a disturbed step.
        new = max(1.0, used * ratio if tried else 1 / ratio)
        old = self._ratios.get(key, new)
        self._ratios[key] = old + TRIAL_WEIGHT * (new - old)
        self._nearest.clear()

    def _note(self, outcome: Outcome) -> None:
        for position in range(min(outcome.num_wanted, outcome.num_accepted + 1)):
            self._num_seen[position] += 1
            weight = max(1 / self._num_seen[position], MIN_WEIGHT)
            was_right = position < outcome.num_accepted
            self._acceptance[position] += weight * (was_right - self._acceptance[position])
