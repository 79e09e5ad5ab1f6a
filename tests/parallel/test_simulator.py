"""When ranks do what. Oracles: the report's Table 2, Narayanan et al.'s and Qi et al.'s closed
forms, the longest path through the graph of what waits for what.
"""

from __future__ import annotations

import random
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest

from rorqual.errors import UsageError
from rorqual.parallel import (
    PIPELINE_ORDERS,
    Action,
    Durations,
    Kind,
    Order,
    Overlapped,
    closed_form,
    make_orders,
    simulate,
    simulate_pipeline,
)

ROUNDING = 1e-9  # sums of the same durations, in another order
EVEN = Durations(forward=1, backward=2, backward_weight=1)
HIDING = Durations(forward=2, backward=4, backward_weight=2, overlapped=5)
LONG_INPUT = Durations(forward=3, backward=5, backward_weight=2, overlapped=6)
LONG_FORWARD = Durations(forward=4, backward=5, backward_weight=2)
Place = tuple[int, int]  # rank, and where in its order
PIPELINES = [(2, 4), (4, 8), (4, 14), (6, 12), (8, 32)]


def bubbles(name: str, ranks: int, micro_batches: int, durations: Durations) -> list[float]:
    return simulate(make_orders(name, ranks, micro_batches), durations).bubbles


@pytest.mark.parametrize(("ranks", "micro_batches"), PIPELINES)
@pytest.mark.parametrize("durations", [EVEN, HIDING, LONG_INPUT])
def test_bubbles_are_those_of_table_2(ranks: int, micro_batches: int, durations: Durations) -> None:
    """F = B - W >= W. In DualPipe ranks near the middle overlap more passes, and wait longest."""
    f, b, w, pair = durations.forward, durations.backward, durations.backward_weight, durations.pair
    assert bubbles("1f1b", ranks, micro_batches, durations) == [(ranks - 1) * (f + b)] * ranks
    zb1p = bubbles("zb1p", ranks, micro_batches, durations)
    assert zb1p == [(ranks - 1) * (f + b - 2 * w)] * ranks
    dualpipe = bubbles("dualpipe", ranks, 2 * micro_batches, durations)
    assert max(dualpipe) == (ranks / 2 - 1) * (pair + b - 3 * w)
    # As many stages on half of the ranks.
    dualpipev = bubbles("dualpipev", ranks // 2, micro_batches, durations)
    assert max(dualpipev) == max(dualpipe)


@pytest.mark.parametrize(("ranks", "micro_batches"), PIPELINES)
def test_memory_is_that_of_table_2(ranks: int, micro_batches: int) -> None:
    for name, copies, activations in [
        ("1f1b", 1, ranks),
        ("zb1p", 1, ranks),
        ("dualpipe", 2, ranks + 1),
    ]:
        simulated = simulate_pipeline(name, ranks, 2 * micro_batches, EVEN)
        assert (simulated.parameters, simulated.activations) == (copies, activations)
    halved = simulate(make_orders("dualpipev", ranks // 2, micro_batches), EVEN)
    assert set(halved.stages) == {2}
    assert set(halved.activations) == {ranks + 1}
    # Where the same ranks divide the same layers, it holds them once.
    assert simulate_pipeline("dualpipev", ranks, 2 * micro_batches, EVEN).parameters == 1


def all_durations() -> list[Durations]:
    return [
        Durations(forward=f, backward=i + w, backward_weight=w, overlapped=pair)
        for f in range(1, 5)
        for i in range(1, 4)
        for w in range(1, 4)
        for pair in {max(f, i + w), f + i + w}
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches"),
    [("1f1b", 4, 5), ("zb1p", 4, 5), ("dualpipe", 6, 12), ("dualpipev", 4, 8)],
)
def test_the_stated_assumption_is_the_whole_one(name: str, ranks: int, micro_batches: int) -> None:
    """Over all durations of small whole numbers Table 2 holds exactly where it is said to. On fewer
    ranks it may hold elsewhere by chance.
    """
    for durations in all_durations():
        form = closed_form(name, ranks, durations)
        assert form is not None
        is_equal = max(bubbles(name, ranks, micro_batches, durations)) == form.bubble
        assert is_equal == form.is_met, durations


def test_sends_make_bubbles_longer() -> None:
    slow = Durations(send=0.25)
    for name in PIPELINE_ORDERS:
        assert max(bubbles(name, 4, 12, slow)) > max(bubbles(name, 4, 12, Durations()))
        form = closed_form(name, 4, slow)
        assert form is None or not form.is_met
    # By hand: the last rank begins a send later, and its last gradient arrives a send later.
    assert bubbles("1f1b", 2, 2, slow) == [1 + 2 + 2 * 0.25] * 2


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_waits_less_by_the_number_of_chunks(chunks: int) -> None:
    """arXiv 2104.04473 §2.2.2: (p - 1) * (F + B) / v."""
    for durations in (EVEN, LONG_FORWARD):
        simulated = simulate_pipeline("interleaved", 4, 12, durations, chunks)
        expected = 3 * (durations.forward + durations.backward) / chunks
        assert simulated.bubble == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_zbv_never_waits_in_the_middle(ranks: int) -> None:
    """arXiv 2401.10241 §6: from its first to its last action no rank waits where F = B - W = W,
    with no more activations than 1F1B.
    """
    simulated = simulate_pipeline("zbv", ranks, 3 * ranks, EVEN)
    for own in simulated.timeline.ranks:
        assert all(before.end == after.start for before, after in pairwise(own))
    assert simulated.activations == ranks


def test_dualpipe_is_dualpipev_and_its_mirror_image() -> None:
    dual = simulate(make_orders("dualpipe", 8, 20), HIDING).ranks
    half = simulate(make_orders("dualpipev", 4, 10), HIDING).ranks
    for rank in range(4):
        times = [(each.start, each.end) for each in half[rank]]
        for same in (dual[rank], dual[7 - rank]):
            assert [(each.start, each.end) for each in same] == times


def graph_of(orders: list[Order]) -> dict[Place, set[Place]]:
    """What each action waits for, straight from what the passes are."""
    places = {
        part: (rank, place)
        for rank, order in enumerate(orders)
        for place, action in enumerate(order)
        for part in action.parts
    }
    last = max(part.stage for part in places)

    def backward(stage: int, number: int) -> Place:
        whole = places.get(Action(Kind.BACKWARD, stage, number))
        return whole or places[Action(Kind.INPUT, stage, number)]

    graph: dict[Place, set[Place]] = {found: set() for found in places.values()}
    for part, (rank, place) in places.items():
        waits = graph[rank, place]
        if place:
            waits.add((rank, place - 1))
        if part.kind == Kind.FORWARD and part.stage:
            waits.add(places[Action(Kind.FORWARD, part.stage - 1, part.micro_batch)])
        if part.kind in (Kind.BACKWARD, Kind.INPUT):
            waits.add(places[Action(Kind.FORWARD, part.stage, part.micro_batch)])
            if part.stage < last:
                waits.add(backward(part.stage + 1, part.micro_batch))
        if part.kind == Kind.WEIGHT:
            waits.add(backward(part.stage, part.micro_batch))
    return graph


@pytest.mark.parametrize("name", PIPELINE_ORDERS)
def test_times_are_longest_paths_and_deadlocks_are_circles(name: str) -> None:
    """Of the order, and of orders in which two actions of a rank have changed places."""
    durations = Durations(forward=3, backward=7, backward_weight=2, overlapped=8, send=1.5)
    chance, num_deadlocks = random.Random(0), 0
    for trial in range(60):
        orders = make_orders(name, 4, 8)
        if trial:
            order = orders[chance.randrange(4)]
            i, j = chance.sample(range(len(order)), 2)
            order[i], order[j] = order[j], order[i]
        graph = graph_of(orders)
        try:
            sequence = list(TopologicalSorter(graph).static_order())
        except CycleError:
            num_deadlocks += 1
            with pytest.raises(UsageError, match="deadlock"):
                simulate(orders, durations)
            continue
        ends: dict[Place, float] = {}
        for rank, place in sequence:
            before = [
                ends[other] + (durations.send if other[0] != rank else 0)
                for other in graph[rank, place]
            ]
            ends[rank, place] = max(before, default=0) + durations.of(orders[rank][place])
        timeline = simulate(orders, durations)
        for (rank, place), end in ends.items():
            assert timeline.ranks[rank][place].end == pytest.approx(end, rel=ROUNDING)
    assert 5 < num_deadlocks < 59


def action(word: str) -> Action:
    return Action(Kind(word[1]), int(word[0]), int(word[2]))


def test_a_deadlock_names_ranks_and_what_they_wait_for() -> None:
    orders: list[Order] = [[action("0F0"), action("0B0")], [action("1B0"), action("1F0")]]
    with pytest.raises(UsageError) as caught:
        simulate(orders, EVEN)
    assert caught.value.found == (
        "rank 0 before 0B0 for 1I0, of rank 1; rank 1 before 1B0 for 1F0, of rank 1"
    )
    with pytest.raises(UsageError, match="for 0F0, which no rank runs"):
        simulate([[], [action("1F0")]], EVEN)
    pair = Overlapped(action("0F0"), action("0B0"))  # a backward beside its own forward
    with pytest.raises(UsageError, match="deadlock"):
        simulate([[pair]], EVEN)


def test_nothing_is_run_twice() -> None:
    twice: Order = [action("0F0"), action("0B0"), action("0I0")]
    with pytest.raises(UsageError, match="0I0 is made twice"):
        simulate([twice], EVEN)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forward": 0.0}, "forward is no duration"),
        ({"send": -1.0}, "send is no duration"),
        ({"backward_weight": 2.0}, "backward_weight takes as long as the backward"),
        ({"overlapped": 1.5}, "overlapped takes less"),
    ],
)
def test_durations_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Durations(**values)
