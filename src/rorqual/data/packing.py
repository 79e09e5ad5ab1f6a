"""Conversations packed whole: a sample holds several, each from its beginning to its end (§5.1).

Cut at fixed places, all that stands behind a cut would be learnt without its question, or never.
So documents become *pieces* that fit a sample, and pieces share samples by best fit:

* A document that fits is one piece. In S = L + 1 tokens L are inputs, so L + 1 fit.
* A conversation that does not fit is split between turns, and each piece begins with the system
  message (all that precedes the first turn). A turn is what lies from a user's message to the next.
* Of a single turn that does not fit, the beginning that does is kept: an answer cut short still
  follows its question, and no end is taught that is none. What is lost is counted.
* A long text is cut into pieces that overlap by one token, so that each token stays a target.

Pieces without targets are left out. The packing is fixed by the seed; an epoch shuffles its
samples. Memory: about 32 bytes a piece, and as much again while packing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rorqual.data.selection import permutation
from rorqual.data.shards import TokenFolder
from rorqual.data.streams import PADDING_ID, Sample, TokenRow
from rorqual.errors import DataError

# Choice: best-fit decreasing in windows of this many pieces. One window over all would fill samples
# a little better, but put documents of equal length side by side in a sample.
WINDOW_PIECES = 1024
SCAN_TOKENS = 1 << 24

PIECE = np.dtype([("head", "<i8"), ("head_length", "<i4"), ("start", "<i8"), ("length", "<i4")])
"""A piece: `length` tokens from `start` on, behind `head_length` tokens (its system message) from
`head` on.
"""


@dataclass(frozen=True)
class Isolation:
    """How documents are told apart: the ids that open a document and a speaker's turn.

    With `is_whole` samples hold whole documents (else texts are cut at fixed places);
    `splits_long` False makes a conversation that does not fit a sample an error.
    """

    begin_id: int
    user_id: int | None = None
    assistant_id: int | None = None
    is_whole: bool = False
    splits_long: bool = True


@dataclass(frozen=True)
class PackingCounts:
    """What became of the documents of an epoch, and of their targets."""

    num_documents: int = 0
    num_split: int = 0
    num_cut: int = 0
    num_targets: int = 0
    num_learnt: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_places: int = 0

    def __add__(self, other: PackingCounts) -> PackingCounts:
        names = [field.name for field in fields(self)]
        return PackingCounts(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def __str__(self) -> str:
        lost = self.num_targets - self.num_learnt
        share = self.num_learnt / max(self.num_targets, 1)
        padding = 1 - self.num_tokens / max(self.num_places, 1)
        # Rounded down: what is not all must not read 100 %.
        learnt = f"{int(share * 10_000) / 100:g} % of {_counted(self.num_targets, 'target')}"
        text = (
            f"an epoch learns {learnt}; {_counted(self.num_documents, 'document')} in "
            f"{_counted(self.num_samples, 'sample')}, {padding:.1%} padding"
        )
        if self.num_split:
            were = "was" if self.num_split == 1 else "were"
            text += f"; {self.num_split:,} too long for a sample {were} split"
        if lost:
            lack = "have a turn that does not fit and lost its end"
            if self.num_cut == 1:
                lack = "has a turn that does not fit and lost its end"
            text += (
                f"; {self.num_cut:,} {lack}, "
                f"{_counted(lost, 'target')} (raise training.sequence_length to keep them)"
            )
        return text


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class PackedStream:
    """Samples of whole documents of one folder; `seeds` choose which stand together."""

    def __init__(
        self,
        folder: TokenFolder,
        sequence_length: int,
        mtp_depth: int,
        isolation: Isolation,
        seeds: Sequence[int],
    ) -> None:
        self.row = TokenRow(folder)
        self.width = sequence_length + 1 + mtp_depth
        capacity = sequence_length + 1
        pieces, counts = _find_pieces(self.row, capacity, isolation)
        order = permutation(len(pieces), *seeds)
        lengths = pieces["head_length"] + pieces["length"]
        bins = best_fit(lengths[order], capacity)
        by_bin = np.argsort(bins, kind="stable")
        self.pieces = pieces[order[by_bin]]
        self.num_samples = int(bins.max()) + 1 if len(bins) else 0
        self.starts = np.searchsorted(bins[by_bin], np.arange(self.num_samples + 1))
        self.counts = counts + PackingCounts(
            num_samples=self.num_samples,
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_places=self.num_samples * capacity,
        )

    def sample(self, index: int) -> Sample:
        tokens = np.full(self.width, PADDING_ID, dtype=np.int64)
        mask = np.zeros(self.width, dtype=bool)
        documents = np.zeros(self.width, dtype=np.int64)
        place = 0
        own = self.pieces[self.starts[index] : self.starts[index + 1]]
        for number, (head, head_length, start, length) in enumerate(own.tolist(), 1):
            for first, count in ((head, head_length), (start, length)):
                here = slice(place, place + count)
                tokens[here], mask[here] = self.row.read(first, first + count)
                documents[here] = number
                place += count
        return Sample(tokens, mask, documents)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """(N,) int64: the bin of each piece; none is fuller than `capacity`.

    Window by window, the longest pieces first, each goes where the least room is left that holds
    it; bins stay open for later windows.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # sizes of room that occur, sorted
    open_bins: dict[int, list[int]] = {}  # room -> bins with just that much
    num_bins = 0
    for first in range(0, len(lengths), WINDOW_PIECES):
        window = lengths[first : first + WINDOW_PIECES]
        for offset in np.argsort(-window, kind="stable").tolist():
            length = int(window[offset])
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, chosen = capacity, num_bins
                num_bins += 1
            else:
                room = rooms[at]
                chosen = open_bins[room].pop()
                if not open_bins[room]:
                    del rooms[at], open_bins[room]
            bins[first + offset] = chosen
            room -= length
            assert room >= 0, "a piece is longer than a sample"
            if room:
                if room not in open_bins:
                    insort(rooms, room)
                open_bins.setdefault(room, []).append(chosen)
    return bins


def _find_pieces(
    row: TokenRow, capacity: int, isolation: Isolation
) -> tuple[np.ndarray, PackingCounts]:
    pieces = [np.empty(0, dtype=PIECE)]
    counts = PackingCounts()
    for number in range(len(row.folder.tokens)):
        found, more = _pieces_of_shard(row, number, capacity, isolation)
        pieces.append(found)
        counts += more
    return np.concatenate(pieces), counts


def _pieces_of_shard(
    row: TokenRow, number: int, capacity: int, isolation: Isolation
) -> tuple[np.ndarray, PackingCounts]:
    tokens, masks = row.folder.tokens[number], row.folder.masks
    if not len(tokens):
        return np.empty(0, dtype=PIECE), PackingCounts()
    starts = _beginnings(tokens, isolation.begin_id, row.folder)
    lengths = np.diff(np.append(starts, len(tokens)))
    # A document's first token is predicted by nothing; of a text alone it is marked.
    if masks is None:
        is_text = np.ones(len(starts), dtype=bool)
        targets = lengths - 1
    else:
        is_text = masks[number][starts] > 0
        targets = np.add.reduceat(masks[number], starts, dtype=np.int64) - is_text
    offset = int(row.starts[number])
    fits = lengths <= capacity
    is_whole = fits & (targets > 0)
    whole = np.zeros(int(is_whole.sum()), dtype=PIECE)
    whole["start"], whole["length"] = starts[is_whole] + offset, lengths[is_whole]
    if not isolation.splits_long and (~fits & ~is_text).any():
        raise _too_long(row.folder, lengths[~fits & ~is_text], capacity)
    parts: list[tuple[int, int, int, int]] = []
    num_split, num_cut, num_learnt = 0, 0, int(targets[fits].sum())
    for document in np.flatnonzero(~fits).tolist():
        start, stop = int(starts[document]) + offset, 0
        stop = start + int(lengths[document])
        if is_text[document]:
            cuts = range(start, stop - 1, capacity - 1)
            own = [(0, 0, cut, min(capacity, stop - cut)) for cut in cuts]
            learnt = int(targets[document])
        else:
            own, learnt = _split(*row.read(start, stop), start, capacity, isolation)
        parts += own
        num_learnt += learnt
        num_split += 1
        num_cut += int(learnt < targets[document])
    counts = PackingCounts(
        num_documents=len(starts),
        num_split=num_split,
        num_cut=num_cut,
        num_targets=int(targets.sum()),
        num_learnt=num_learnt,
    )
    return np.concatenate([whole, np.array(parts, dtype=PIECE)]), counts


def _split(
    tokens_N: np.ndarray, mask_N: np.ndarray, start: int, capacity: int, isolation: Isolation
) -> tuple[list[tuple[int, int, int, int]], int]:
    """(pieces with targets, the number of those targets) of a conversation that does not fit."""
    turns = _turns(tokens_N, mask_N, isolation)
    head = turns[0]  # the system message and tools: what stands before the first turn
    room = capacity - head
    pieces: list[tuple[int, int, int, int]] = []
    num_learnt = 0
    first = 0
    while first < len(turns) - 1:
        last = first + 1
        while last < len(turns) - 1 and turns[last + 1] - turns[first] <= room:
            last += 1
        begin, end = turns[first], min(turns[last], turns[first] + max(room, 0))
        num_targets = int(mask_N[begin:end].sum())
        if num_targets:
            pieces.append((start, head, start + begin, end - begin))
            num_learnt += num_targets
        first = last
    return pieces, num_learnt


def _turns(tokens_N: np.ndarray, mask_N: np.ndarray, isolation: Isolation) -> list[int]:
    """Where turns begin, and the end; a user's message that nothing answered joins the next."""
    speakers = [i for i in (isolation.user_id, isolation.assistant_id) if i is not None]
    opens = np.flatnonzero(np.isin(tokens_N, speakers))
    turns = [int(opens[0]) if len(opens) else 0]
    for place in np.flatnonzero(tokens_N == isolation.user_id).tolist():
        if mask_N[turns[-1] : place].any():
            turns.append(place)
    return [*turns, len(tokens_N)]


def _beginnings(tokens: np.ndarray, begin_id: int, folder: TokenFolder) -> np.ndarray:
    """Places of `begin_id`, a part of the memory map at a time."""
    parts = [
        np.flatnonzero(tokens[first : first + SCAN_TOKENS] == begin_id) + first
        for first in range(0, len(tokens), SCAN_TOKENS)
    ]
    starts = np.concatenate(parts)
    if not len(starts) or starts[0]:
        raise DataError(
            "a shard does not begin with a document",
            where=folder.path,
            found=f"id {int(tokens[0])}",
            expected=f"the begin-of-sentence id {begin_id}",
            fix="build it again with `rorqual data build RECIPE`",
        )
    return starts


def _too_long(folder: TokenFolder, lengths: np.ndarray, capacity: int) -> DataError:
    return DataError(
        "conversations do not fit a sample",
        where=folder.path,
        found=f"{len(lengths):,}, the longest of {int(lengths.max()):,} tokens",
        expected=f"at most {capacity:,} tokens, training.sequence_length + 1",
        fix='raise training.sequence_length, or set training.long_conversations = "split"',
    )
