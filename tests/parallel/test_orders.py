"""Pipeline orders. Oracles: torch.distributed.pipelining's own orders, action by action; rows that
were stepped through by hand; what every order must do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from rorqual.errors import UsageError
from rorqual.parallel import PIPELINE_ORDERS, Durations, Kind, Order, make_orders, simulate
from rorqual.parallel.actions import stages_of
from rorqual.parallel.orders import dualpipe, dualpipev, interleaved, one_f_one_b, zb1p, zbv

SIZES = [(1, 2), (2, 4), (2, 7), (3, 6), (4, 8), (4, 12), (4, 13), (6, 24), (8, 40)]


class Stage(_PipelineStageBase):
    """What torch's orders ask of a stage: numbers."""

    _create_grad_recv_info = _prepare_backward_infra = _prepare_forward_infra = None

    def __init__(self, ranks: int, num_stages: int, index: int) -> None:
        self.group_size, self.group_rank = ranks, 0
        self.num_stages, self.stage_index = num_stages, index
        self.group = self.submod = None
        self.has_backward = True


def words(order: Order) -> list[str]:
    return [str(action) for action in order]


def words_of_torch(order: list[Any]) -> list[str]:
    """Without the places where a rank waits, which torch writes down, and without collectives."""
    return [str(a) for a in order if a is not None and "REDUCE" not in str(a)]


def torchs(name: str, ranks: int, micro_batches: int, chunks: int) -> dict[int, list[Any]]:
    num_stages = ranks * chunks
    stages = [Stage(ranks, num_stages, index * ranks) for index in range(chunks)]
    return getattr(schedules, name)(stages, micro_batches).pipeline_order


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
@pytest.mark.parametrize(
    ("make", "name", "chunks"),
    [
        (zb1p, "ScheduleInterleavedZeroBubble", 1),  # of one stage a rank it is ZB1P
        (zbv, "ScheduleZBVZeroBubble", 2),
        (dualpipev, "ScheduleDualPipeV", 2),
    ],
)
def test_orders_are_those_of_torch(
    make: Callable[[int, int, int], Order], name: str, chunks: int, ranks: int, micro_batches: int
) -> None:
    try:
        expected = torchs(name, ranks, micro_batches, chunks)
    except ValueError as refusal:
        if "rounds" not in str(refusal):  # for several stages a rank, which ZB1P has not
            with pytest.raises(UsageError):
                make(0, ranks, micro_batches)
        return
    for rank in range(ranks):
        assert words(make(rank, ranks, micro_batches)) == words_of_torch(expected[rank])


class RecordedStage(Stage):
    """Notes what torch's 1F1B runs on it, and neither computes nor sends."""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__(ranks, ranks, rank)
        self.ran: list[str] = []

    def forward_one_chunk(self, number: int, *_: object, **__: object) -> None:
        self.ran.append(f"{self.stage_index}F{number}")

    def backward_one_chunk(self, number: int, *_: object, **__: object) -> None:
        self.ran.append(f"{self.stage_index}B{number}")

    def nothing(self, *_: object, **__: object) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = nothing
    perform_reduce_grad = nothing


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_1f1b_is_what_torch_runs(ranks: int, micro_batches: int) -> None:
    """What it runs and not what it writes down: in torch 2.13 `_get_pipeline_order` counts the last
    rank's forwards from 1.
    """
    for rank in range(ranks):
        stage = RecordedStage(ranks, rank)
        schedule = schedules.Schedule1F1B(stage, micro_batches)
        schedule._initialize_stage = stage.nothing
        schedule._step_microbatches()
        assert words(one_f_one_b(rank, ranks, micro_batches)) == stage.ran
    with pytest.raises(ValueError, match="must be greater than"):
        schedules.Schedule1F1B(RecordedStage(4, 0), 3)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "micro_batches"), [*SIZES, (4, 3), (4, 10)])
def test_interleaved_is_that_of_torch(ranks: int, micro_batches: int, chunks: int) -> None:
    """With fewer micro-batches than ranks and rounds of more than `ranks` too."""
    try:
        expected = torchs("ScheduleInterleaved1F1B", ranks, micro_batches, chunks)
    except ValueError:
        with pytest.raises(UsageError, match="equal rounds"):
            interleaved(0, ranks, micro_batches, chunks)
        return
    for rank in range(ranks):
        order = interleaved(rank, ranks, micro_batches, chunks)
        assert words(order) == words_of_torch(expected[rank])


def test_zbv_of_few_micro_batches_is_that_of_torch() -> None:
    for micro_batches in range(1, 7):
        expected = torchs("ScheduleZBVZeroBubble", 4, micro_batches, 2)
        for rank in range(4):
            assert words(zbv(rank, 4, micro_batches)) == words_of_torch(expected[rank])
        simulate(make_orders("zbv", 4, micro_batches), Durations())  # and no rank waits for ever


def test_torch_reads_what_we_write() -> None:
    for order in make_orders("dualpipev", 2, 6):
        for word in words(order):
            assert str(schedules._Action.from_str(word)) == word


# Stepped through by hand: how often each step of DeepSeek's published loop runs on this rank, and
# which micro-batch and direction it then takes. Stage 3 is the end of the way of 0 to 3, which
# enter at rank 0; stage 0 on rank 3 is the beginning of the way of 4 to 7.
DUALPIPE_OF_4_RANKS = {
    0: "0F0 0F1 0F2 3F4 3I4 3W4 3F5 (0F3;3B5) (3F6;0B0) 3B6 (3F7;0B1) 3B7 0I2 0W2 0I3 0W3",
    1: "1F0 2F4 1F1 2F5 1F2 2B4 (2F6;1B0) (1F3;2B5) (2F7;1B1) 2B6 1B2 2I7 1I3 2W7 1W3",
    2: "1F4 2F0 1F5 2F1 1F6 2B0 (2F2;1B4) (1F7;2B1) (2F3;1B5) 2B2 1B6 2I3 1I7 2W3 1W7",
    3: "0F4 0F5 0F6 3F0 3I0 3W0 3F1 (0F7;3B1) (3F2;0B4) 3B2 (3F3;0B5) 3B3 0I6 0W6 0I7 0W7",
}


@pytest.mark.parametrize("rank", DUALPIPE_OF_4_RANKS)
def test_dualpipe_stepped_through_by_hand(rank: int) -> None:
    order = [word.removesuffix("OVERLAP_F_B") for word in words(dualpipe(rank, 4, 8))]
    assert " ".join(order) == DUALPIPE_OF_4_RANKS[rank]


@pytest.mark.parametrize("name", PIPELINE_ORDERS)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 12), (8, 24)])
def test_every_pass_is_run_once(name: str, ranks: int, micro_batches: int) -> None:
    orders = make_orders(name, ranks, micro_batches)
    parts = Counter(part for order in orders for action in order for part in action.parts)
    assert set(parts.values()) == {1}
    done = {kind: {(p.stage, p.micro_batch) for p in parts if p.kind == kind} for kind in Kind}
    stages = range(1 + max(part.stage for part in parts))
    all_of_them = {(stage, number) for stage in stages for number in range(micro_batches)}
    assert done[Kind.FORWARD] == done[Kind.BACKWARD] | done[Kind.INPUT] == all_of_them
    assert done[Kind.INPUT] == done[Kind.WEIGHT]
    assert not done[Kind.BACKWARD] & done[Kind.INPUT]


def test_which_stages_a_rank_holds() -> None:
    assert [stages_of(order) for order in make_orders("interleaved", 2, 4, num_chunks=3)] == [
        [0, 2, 4],
        [1, 3, 5],
    ]
    for name in ("zbv", "dualpipev"):
        assert [stages_of(order) for order in make_orders(name, 3, 6)] == [[0, 5], [1, 4], [2, 3]]
    dual = [stages_of(order) for order in make_orders("dualpipe", 4, 8)]
    assert dual == [[0, 3], [1, 2], [1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "message"),
    [
        ("1f1b", 4, 3, "at least 4: one for each rank"),
        ("zb1p", 4, 3, "at least 4"),
        ("zbv", 4, 0, "at least 1"),
        ("interleaved", 4, 9, "take 8 micro-batches"),
        ("dualpipev", 4, 7, "at least 8"),
        ("dualpipe", 3, 8, "even number of ranks"),
        ("dualpipe", 4, 9, "as many micro-batches in one direction"),
        ("dualpipe", 4, 6, "at least 8"),
        ("gpipe", 4, 8, "one of 1f1b, interleaved, zb1p, zbv, dualpipev, dualpipe"),
    ],
)
def test_what_cannot_be_is_said(name: str, ranks: int, micro_batches: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_orders(name, ranks, micro_batches)


def test_no_such_rank_and_no_such_chunks() -> None:
    with pytest.raises(UsageError, match="no such rank"):
        one_f_one_b(4, 4, 8)
    with pytest.raises(UsageError, match="only interleaved"):
        make_orders("1f1b", 4, 8, num_chunks=2)
    with pytest.raises(UsageError, match="several chunks"):
        make_orders("interleaved", 4, 8, num_chunks=1)
