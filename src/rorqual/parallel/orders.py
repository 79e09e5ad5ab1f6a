"""The orders of a pipeline: pure functions (rank, ranks, micro-batches) -> what this rank runs.

| order | stages a rank | source |
|---|---|---|
| 1F1B | 1 | Narayanan et al., arXiv 1806.03377; as in 2104.04473 §2.2.1 |
| interleaved 1F1B | chunks | 2104.04473 §2.2.2 |
| ZB1P | 1 | Qi et al., 2401.10241: their ZB-H1 |
| ZBV | 2, in a V | 2401.10241 §6 |
| DualPipe | 2, one for each direction | the report, §3.2.1 |
| DualPipeV | 2, in a V | github.com/deepseek-ai/DualPipe |

In a V, rank r has stage r on the way there and stage 2 * num_ranks - 1 - r on the way back: the
first rank has both ends of the model, so that embedding and head are together (§3.2.2). In DualPipe
the first half of the micro-batches enters at the first rank and the second half at the last; a rank
holds a stage for each direction, so that the model is there twice.

Each order is written with a rank's own *chunks* (0, 1, ...) instead of stages and without
micro-batches: `(F0, B1)` is "the next forward of chunk 0 together with the next backward of chunk
1".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rorqual.errors import UsageError
from rorqual.parallel.actions import Action, Kind, Order, Overlapped


class Next(NamedTuple):
    """This kind of pass of the next micro-batch of a chunk; without chunk, the weight gradients
    that have been left the longest.
    """

    kind: Kind
    chunk: int | None


# One entry of a rank's order: one pass, or two that run together.
Entry = Next | tuple[Next, Next]
# (chunk, how many of its micro-batches came before) -> (stage, micro-batch)
Place = Callable[[int, int], tuple[int, int]]

F0, F1 = Next(Kind.FORWARD, 0), Next(Kind.FORWARD, 1)
B0, B1 = Next(Kind.BACKWARD, 0), Next(Kind.BACKWARD, 1)
I0, I1 = Next(Kind.INPUT, 0), Next(Kind.INPUT, 1)
W0, W1, W = Next(Kind.WEIGHT, 0), Next(Kind.WEIGHT, 1), Next(Kind.WEIGHT, None)


def one_f_one_b(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """1F1B: a rank begins its backward passes as early as it can, and then takes turns."""
    _check_rank(rank, num_ranks)
    _check_number(num_micro_batches, at_least=num_ranks, why="one for each rank")
    passes = range(num_micro_batches)
    entries = _taking_turns([F0 for _ in passes], [B0 for _ in passes], ahead=num_ranks - 1 - rank)
    return _numbered(entries, lambda chunk, number: (rank, number))


def interleaved(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int = 2) -> Order:
    """1F1B with several stages a rank, `num_ranks` apart. Micro-batches come in rounds of about
    `num_ranks`, and a round goes through a rank's chunks one after the other.
    """
    _check_rank(rank, num_ranks)
    _check_number(num_micro_batches, at_least=1, why="one")
    if num_chunks < 2:
        raise UsageError(
            "interleaved 1F1B needs several chunks", found=num_chunks, expected="2 or more"
        )
    num_rounds = max(1, num_micro_batches // num_ranks)
    if num_micro_batches % num_rounds:
        raise UsageError(
            "interleaved 1F1B cannot divide its micro-batches into equal rounds",
            found=f"{num_micro_batches} micro-batches in {num_rounds} rounds",
            expected=f"a multiple of {num_rounds}, the rounds of {num_ranks} ranks or more",
            fix=f"take {num_micro_batches - num_micro_batches % num_rounds} micro-batches",
        )
    size = num_micro_batches // num_rounds
    there = [chunk for _ in range(num_rounds) for chunk in range(num_chunks) for _ in range(size)]
    entries = _taking_turns(
        [Next(Kind.FORWARD, chunk) for chunk in there],
        [Next(Kind.BACKWARD, num_chunks - 1 - chunk) for chunk in there],
        ahead=(num_chunks - 1) * size + 2 * (num_ranks - 1 - rank),
    )
    return _numbered(entries, lambda chunk, number: (chunk * num_ranks + rank, number))


def zb1p(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """1F1B whose weight gradients come later, the nearer to the end the later: the rank before
    waits only for the input's gradient. No rank holds more activations than the first of 1F1B.
    """
    _check_rank(rank, num_ranks)
    _check_number(num_micro_batches, at_least=num_ranks, why="one for each rank")
    passes = range(num_micro_batches)
    turns = _taking_turns([F0 for _ in passes], [I0 for _ in passes], ahead=num_ranks - 1 - rank)
    entries: list[Entry] = []
    num_waiting = 0
    for entry in turns:
        entries.append(entry)
        num_waiting += entry == I0
        if num_waiting > rank:
            entries.append(W0)
            num_waiting -= 1
    entries += [W0] * num_waiting
    return _numbered(entries, lambda chunk, number: (rank, number))


def zbv(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """Two stages a rank in a V, and weight gradients where a rank would wait. Nothing waits in the
    middle where F, I and W take equally long. Of fewer than 2 * num_ranks - 1 micro-batches the
    order is that of so many, without the others.
    """
    _check_rank(rank, num_ranks)
    _check_number(num_micro_batches, at_least=1, why="one")
    after = num_ranks - 1 - rank
    full = max(num_micro_batches, 2 * num_ranks - 1)
    entries: list[Entry] = [
        *[F0] * (2 * after + 1),
        *[F1, F0] * rank,
        *[F1, I1, W1] * (after + 1),
        *[F0, I0, W0, F1, I1, W1] * (full - 2 * num_ranks + 1 + rank),
        *[I0, W0, F1, I1, W1] * after,
        *[I0, I1] * rank,
        *[I0, W0] * (after + 1),
        *[W1] * rank,
        *[W0] * rank,
    ]
    order = _numbered(entries, _in_a_v(rank, num_ranks))
    return [action for action in order if action.parts[0].micro_batch < num_micro_batches]


def dualpipev(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """DualPipe cut in half: two stages a rank in a V, forwards of one overlapped with backwards of
    the other.
    """
    _check_rank(rank, num_ranks)
    _check_number(
        num_micro_batches, at_least=2 * num_ranks, why="one for each stage, two stages a rank"
    )
    return _numbered(_dual_entries(rank, num_ranks, num_micro_batches), _in_a_v(rank, num_ranks))


def dualpipe(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """Micro-batches from both ends (§3.2.1, figure 5). Chunk 0 is the stage of the direction that
    enters at the nearer end. The later half of the micro-batches is the one that enters at the last
    rank.
    """
    _check_rank(rank, num_ranks)
    if num_ranks % 2:
        raise UsageError(
            "DualPipe needs an even number of ranks", found=num_ranks, expected="2, 4, ..."
        )
    if num_micro_batches % 2:
        raise UsageError(
            "DualPipe needs as many micro-batches in one direction as in the other",
            found=num_micro_batches,
            expected="an even number",
        )
    _check_number(num_micro_batches, at_least=2 * num_ranks, why="two for each rank")
    half = num_micro_batches // 2
    mirrored = num_ranks - 1 - rank
    is_near_last = rank > mirrored
    entries = _dual_entries(min(rank, mirrored), num_ranks // 2, half)

    def place(chunk: int, number: int) -> tuple[int, int]:
        is_reverse = is_near_last != (chunk == 1)
        return (mirrored, half + number) if is_reverse else (rank, number)

    return _numbered(entries, place)


def _dual_entries(rank: int, num_ranks: int, num_micro_batches: int) -> list[Entry]:
    """What DualPipe and DualPipeV share; in DualPipe `rank` is the distance from the nearer end,
    `num_ranks` half of them, and `num_micro_batches` those of one direction.
    """
    after = num_ranks - 1 - rank
    steady: list[Entry] = [(F0, B1), (F1, B0)] * (num_micro_batches - 2 * num_ranks + rank + 1)
    if after == 0:
        steady[:1] = [F0, B1]  # Not overlapped at the turn: the other ranks wait for both.
    ending: list[Entry] = [B1, (F1, B0)] * after
    return [
        *[F0] * (2 * after),
        *[F0, F1] * (rank + 1),
        *[I1, W, F1] * after,
        *steady,
        *ending,
        # Of the last backward passes one half is whole; of the other the weights come later.
        *([B1, B0] * (rank + 1))[: rank + 1],
        *([I1, I0] * (rank + 1))[rank + 1 :],
        *[W, I0] * after,
        *[W] * (rank + 1),
    ]


def _taking_turns(forwards: list[Next], backwards: list[Next], ahead: int) -> list[Entry]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    later = forwards[ahead:]
    turns = [entry for pair in zip(later, backwards, strict=False) for entry in pair]
    return [*forwards[:ahead], *turns, *backwards[len(later) :]]


def _in_a_v(rank: int, num_ranks: int) -> Place:
    """Stages go down the ranks and up again."""
    return lambda chunk, number: (2 * num_ranks - 1 - rank if chunk else rank, number)


def _numbered(entries: Sequence[Entry], place: Place) -> Order:
    """Stages and micro-batches for what was written with chunks: each kind of pass takes them in
    order.
    """
    counts: Counter[tuple[str, int]] = Counter()
    left: list[tuple[int, int]] = []  # weight gradients to do: chunk and number

    def numbered(entry: Next) -> Action:
        if entry.kind == Kind.WEIGHT:
            chunk, number = next(
                found for found in left if entry.chunk is None or found[0] == entry.chunk
            )
            left.remove((chunk, number))
        else:
            assert entry.chunk is not None, "only weight gradients may leave the chunk open"
            chunk = entry.chunk
            way = "there" if entry.kind == Kind.FORWARD else "back"
            number = counts[way, chunk]
            counts[way, chunk] += 1
            if entry.kind == Kind.INPUT:
                left.append((chunk, number))
        return Action(entry.kind, *place(chunk, number))

    return [
        numbered(entry)
        if isinstance(entry, Next)
        else Overlapped(numbered(entry[0]), numbered(entry[1]))
        for entry in entries
    ]


def _check_rank(rank: int, num_ranks: int) -> None:
    if not 0 <= rank < num_ranks:
        raise UsageError(
            "no such rank in the pipeline", found=rank, expected=f"0 to {num_ranks - 1}"
        )


def _check_number(num_micro_batches: int, *, at_least: int, why: str) -> None:
    if num_micro_batches < at_least:
        raise UsageError(
            "too few micro-batches for this pipeline order",
            found=num_micro_batches,
            expected=f"at least {at_least}: {why}",
        )
