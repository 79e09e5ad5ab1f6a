"""Oracle: tokens a second in closed form, for machines whose costs are chosen here."""

from __future__ import annotations

import random

import pytest

from rorqual.engine.draft_policy import (
    FREE_TRIALS,
    MAX_TRIAL_STEPS,
    TRIAL_SHARE,
    WINDOW,
    FixedDrafts,
    Outcome,
    PayingDrafts,
)

NUM_STEPS = 4000


class Machine:
    """Steps of a chosen cost, answers whose drafts are right by a chosen chance."""

    def __init__(self, max_drafts: int, seconds: list[float], acceptance: list[float]) -> None:
        self.now = 0.0
        self.seconds, self.acceptance = seconds, acceptance
        self.policy = PayingDrafts(max_drafts, clock=lambda: self.now)
        self.dice = random.Random(1)
        self.noise = 0.0
        self.seconds_by_drafts = [0.0] * (max_drafts + 1)

    def run(self, num_steps: int, num_answers: int = 1, *, is_decode: bool = True) -> float:
        """Tokens a second of each answer."""
        since, num_tokens = self.now, 0
        for _ in range(num_steps):
            num_drafts = self.policy.begin(num_answers)
            cost = self.seconds[num_drafts] * (1 + self.noise * self.dice.uniform(-1, 1))
            self.now += cost
            self.seconds_by_drafts[num_drafts] += cost
            outcomes = [self._outcome(num_drafts) for _ in range(num_answers)]
            self.policy.end(outcomes, is_decode=is_decode)
            num_tokens += sum(1 + outcome.num_accepted for outcome in outcomes)
        return num_tokens / num_answers / (self.now - since)

    def best(self) -> tuple[float, int]:
        """The closed form: tokens a second, and with how many drafts."""
        worth, chance, tokens = [], 1.0, 0.0
        for share, seconds in zip([1.0, *self.acceptance], self.seconds, strict=True):
            chance *= share
            tokens += chance
            worth.append(tokens / seconds)
        return max(worth), worth.index(max(worth))

    def _outcome(self, num_drafts: int) -> Outcome:
        num_accepted = 0
        while num_accepted < num_drafts and self.dice.random() < self.acceptance[num_accepted]:
            num_accepted += 1
        return Outcome(num_drafts, num_accepted)


@pytest.mark.parametrize(
    ("seconds", "acceptance", "expected"),
    [
        ([1.0, 1.2], [0.7], 1),  # 1.7 tokens in 1.2 s
        ([1.0, 1.9], [0.7], 0),  # in 1.9 s
        ([1.0, 1.1], [0.02], 0),  # 1.02 tokens in 1.1 s
        ([1.0, 10.0], [0.9], 0),
        ([1.0, 1.1, 1.2, 1.3], [0.9, 0.9, 0.9], 3),
        ([1.0, 1.1, 1.2, 2.5], [0.9, 0.9, 0.9], 2),
        ([1.0, 1.3, 1.6, 1.9], [0.6, 0.3, 0.3], 1),
        ([1.0, 3.0, 3.1, 3.2], [0.95, 0.95, 0.95], 3),  # pays with many drafts only
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_settles_on_what_pays(
    seconds: list[float], acceptance: list[float], expected: int, noise: float
) -> None:
    machine = Machine(len(acceptance), seconds, acceptance)
    best, num_drafts = machine.best()
    assert num_drafts == expected
    machine.noise = noise
    machine.run(NUM_STEPS)
    rate = machine.run(NUM_STEPS)
    assert machine.policy.num_drafts == expected
    assert rate > (1 - 2 * TRIAL_SHARE) * best


def test_what_trials_cost_is_bounded_however_slow_they_are() -> None:
    machine = Machine(1, [1.0, 100.0], [0.9])
    machine.run(NUM_STEPS)
    lost = machine.seconds_by_drafts[1]
    machine.run(20 * NUM_STEPS)
    longest = 100.0 * (WINDOW + 1)
    assert machine.seconds_by_drafts[1] - lost <= TRIAL_SHARE * machine.now + longest
    assert machine.seconds_by_drafts[1] > lost, "it never looks again"


def test_it_follows_a_change() -> None:
    machine = Machine(2, [1.0, 1.1, 1.2], [0.8, 0.8])
    machine.run(NUM_STEPS)
    assert machine.policy.num_drafts == 2
    machine.acceptance = [0.02, 0.02]  # a text that nobody can guess
    machine.run(NUM_STEPS)
    assert machine.policy.num_drafts == 0
    machine.acceptance = [0.8, 0.8]
    machine.run(20 * NUM_STEPS)
    assert machine.policy.num_drafts == 2
    machine.seconds = [1.0, 2.5, 4.0]  # a machine on which rows are dear
    machine.run(20 * NUM_STEPS)
    assert machine.policy.num_drafts == 0


def test_steps_that_grow_slower_alike_change_nothing() -> None:
    """A text that grows makes all steps slower; comparing old with new would end drafting."""
    machine = Machine(1, [1.0, 1.2], [0.7])
    machine.run(NUM_STEPS)
    for _ in range(NUM_STEPS // 10):
        machine.seconds = [1.01 * cost for cost in machine.seconds]
        machine.run(10)
        assert machine.policy.num_drafts == 1


def test_batches_of_each_size_have_their_own_cost() -> None:
    machine = Machine(1, [1.0, 1.1], [0.7])
    machine.run(NUM_STEPS, num_answers=1)
    assert machine.policy.num_drafts == 1
    machine.seconds = [1.0, 1.95]  # the rows of many answers fill the machine
    machine.run(3 * NUM_STEPS, num_answers=16)
    assert machine.policy.num_drafts == 0
    machine.seconds = [1.0, 1.1]
    machine.run(10, num_answers=1)
    assert machine.policy.num_drafts == 1, "what 16 answers taught holds for one"


def test_an_unknown_size_begins_with_what_the_nearest_knows() -> None:
    machine = Machine(1, [1.0, 1.1], [0.7])
    machine.run(NUM_STEPS, num_answers=8)
    assert machine.policy.begin(20) == 1


def test_of_several_known_sizes_the_nearest_one_counts() -> None:
    """Of 1 answer and of 16, in powers of two; smaller and larger ones alike."""
    machine = Machine(1, [1.0, 1.1], [0.7])
    machine.run(NUM_STEPS, num_answers=1)
    machine.seconds = [1.0, 1.95]
    machine.run(3 * NUM_STEPS, num_answers=16)
    for num_answers, num_drafts in ((1, 1), (3, 1), (8, 0), (15, 0), (64, 0)):
        assert machine.policy.begin(num_answers) == num_drafts, num_answers


def test_steps_with_prompts_are_no_measure() -> None:
    machine = Machine(1, [1.0, 50.0], [0.7])
    machine.run(NUM_STEPS, is_decode=False)
    assert machine.seconds_by_drafts[1] == 0, "nothing can be learnt here, so nothing is tried"
    machine.seconds = [1.0, 1.2]
    machine.run(NUM_STEPS)
    assert machine.policy.num_drafts == 1


def test_a_trial_that_prompts_interrupt_is_given_up() -> None:
    machine = Machine(1, [1.0, 50.0], [0.7])
    machine.run(WINDOW)
    machine.run(100 * MAX_TRIAL_STEPS, is_decode=False)
    assert machine.seconds_by_drafts[1] == 50.0 * MAX_TRIAL_STEPS


def test_without_drafts_there_is_nothing_to_choose() -> None:
    policy = PayingDrafts(0)
    assert policy.begin(3) == 0
    policy.end([Outcome(0, 0)], is_decode=True)
    assert policy.num_drafts == 0
    fixed = FixedDrafts(3)
    assert (fixed.begin(5), fixed.num_drafts) == (3, 3)


def test_a_trial_that_shows_that_it_cannot_pay_ends() -> None:
    """After three steps, of which the first catches up; what the next one takes is 2 % at most."""
    machine = Machine(1, [1.0, 100.0], [0.9])
    machine.run(WINDOW)
    machine.run(WINDOW + 1)
    assert machine.seconds_by_drafts[1] == 3 * 100
    machine.run(50 * WINDOW)
    assert machine.seconds_by_drafts[1] == 3 * 100


def test_what_was_measured_badly_and_promises_much_is_tried_again_at_once() -> None:
    """Three trials of each number are free; all their steps count."""
    machine = Machine(1, [1.0, 1.75], [1.0])  # with the prior 1.95 tokens at most
    per_trial = WINDOW + 1
    machine.policy._acceptance[0], machine.policy._num_seen[0] = 0.7, 10**9
    machine.acceptance = [0.7]
    machine.run(WINDOW)
    machine.run(FREE_TRIALS * per_trial)
    assert machine.seconds_by_drafts[1] == FREE_TRIALS * per_trial * 1.75
    machine.run(20 * WINDOW)
    assert machine.seconds_by_drafts[1] == FREE_TRIALS * per_trial * 1.75


@pytest.mark.parametrize("max_drafts", [1, 2, 3])
def test_drafts_that_are_never_right_cost_little_from_the_start(max_drafts: int) -> None:
    """Six answers of 32 tokens take at most 2 % more than without drafts."""
    seconds = [1.0, 1.6, 2.2, 2.8][: max_drafts + 1]
    machine = Machine(max_drafts, seconds, [0.0] * max_drafts)
    machine.run(6 * 32)
    assert machine.now <= 1.02 * 6 * 32
    machine.run(NUM_STEPS)
    assert machine.now <= (1 + TRIAL_SHARE) * (NUM_STEPS + 6 * 32)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_drafts_that_are_mostly_right_pay_from_the_start(noise: float) -> None:
    """The first answers of 150 tokens take a sixth less; the closed form is a third less."""
    machine = Machine(2, [1.0, 1.4, 1.8], [0.95, 0.8])
    machine.noise, num_tokens = noise, 0.0
    while num_tokens < 150:
        since = machine.now
        num_tokens += machine.run(1) * (machine.now - since)
    assert machine.now < 150 * 5 / 6
    assert machine.policy.num_drafts > 0


def test_a_trial_counts_by_its_median_behind_its_first_step() -> None:
    """Of five steps with a draft the first catches up, and one is slow; none decides."""
    machine = Machine(1, [1.0, 1.0], [0.9])
    machine.run(WINDOW)
    for seconds in (99.0, 1.0, 1.2, 1.4, 50.0):
        machine.seconds = [1.0, seconds]
        machine.run(1)
    assert machine.policy._ratios == {(1, 1): pytest.approx(1.3)}


def test_steps_with_drafts_never_count_as_cheaper_than_without() -> None:
    """The steps beside the trial were disturbed."""
    machine = Machine(1, [9.0, 1.0], [0.9])
    machine.run(WINDOW)
    machine.run(WINDOW + 1)
    assert machine.policy._ratios == {(1, 1): 1.0}


def test_acceptance_is_a_mean_that_begins_with_the_report() -> None:
    """0.85 counts as three drafts; the second draft is judged only where the first was right."""
    policy = PayingDrafts(2, clock=lambda: 0.0)
    wanted = [0.85, 0.85]
    for count, (num_wanted, num_accepted) in enumerate([(2, 0), (2, 1), (1, 1), (2, 2)], 1):
        policy.begin(1)
        policy.end([Outcome(num_wanted, num_accepted)], is_decode=True)
        wanted[0] += ((num_accepted > 0) - wanted[0]) / (3 + count)
    for count, is_right in enumerate((False, True), 1):
        wanted[1] += (is_right - wanted[1]) / (3 + count)
    assert policy._acceptance == pytest.approx(wanted)
    for _ in range(300):
        policy.end([Outcome(1, 1)], is_decode=True)
    before = policy._acceptance[0]
    policy.end([Outcome(1, 0)], is_decode=True)
    assert policy._acceptance[0] == pytest.approx(0.99 * before)
