"""From logits to committed tokens: speculative verification, and plain decoding as its simplest
case.

A draft is a guess at one token, so rejection sampling (arXiv 2211.17192) accepts draft d with
probability p(d), and else draws from p without d. The same law comes from drawing a token from p as
if there were no draft, and going on while it equals the draft. So it is done here: from the same
logits a seed draws the same tokens with and without speculation, with every setting. (`Engine` says
what is promised of texts.)
"""

# N rows of logits, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.engine.guide import Guide
from rorqual.engine.logprobs import TokenLogprob, token_logprobs
from rorqual.engine.sampler import Row, check_finite, choose, not_finite
from rorqual.engine.sampling_state import SamplingState

REDRAW = 32.0
"""After a refused token the next draw takes the random number without its first five bits: of 53
bits, enough for eight draws more.
"""


class Scores(NamedTuple):
    """What the model says of some rows: float32 logits, or the likeliest ids (-1 where a logit is
    not finite), or both.
    """

    logits_NV: Tensor | None = None
    likeliest_N: Sequence[int] | None = None


@dataclass(frozen=True)
class Verified:
    """Tokens that an answer takes in one step: `num_accepted` drafts and, unless one of these
    ended the answer, a new one.

    `logprobs` has one entry a token if the request asked for them. `guide`: the answer's, behind
    these tokens.
    """

    token_ids: tuple[int, ...]
    num_accepted: int
    logprobs: tuple[TokenLogprob, ...]
    guide: Guide | None = field(default=None, compare=False)


def verify(
    scores: Scores,
    drafts: Sequence[Sequence[int]],
    states: Sequence[SamplingState],
    *,
    is_row_by_row: bool = False,
) -> list[Verified]:
    """Chooses the next tokens of each answer; the states stay where they are.

    Answer i owns the next `1 + len(drafts[i])` rows; its row j stands after its first j drafts.
    CheckpointError if the logits are not numbers. Ids beyond the tokenizer, rows that only round
    the model's shape, are never chosen. `is_row_by_row`: no row's sums depend on the others', to
    the last bit. Without logits all states are plain.
    """
    assert len(drafts) == len(states), "one list of drafts for each answer"
    if not states:
        return []
    logits_NV, likeliest_N = scores
    if logits_NV is None:
        assert likeliest_N is not None, "rows were scored"
        return _take_likeliest(likeliest_N, drafts, states)
    walks, num_rows = [], 0
    for draft_ids, state in zip(drafts, states, strict=True):
        walks.append(_Walk(num_rows, draft_ids, state))
        num_rows += 1 + len(draft_ids)
    assert len(logits_NV) == num_rows, f"{len(logits_NV)} rows of logits for {num_rows} tokens"
    logits_NV = logits_NV[:, : states[0].vocab_size]
    try:
        _walk_all(logits_NV, walks, is_row_by_row)
    finally:
        for walk in walks:
            walk.rewind()
    return [walk.verified(logits_NV, is_row_by_row) for walk in walks]


def _take_likeliest(
    likeliest_N: Sequence[int], drafts: Sequence[Sequence[int]], states: Sequence[SamplingState]
) -> list[Verified]:
    """What `verify` chooses where nothing but the likeliest token is asked for."""
    if min(likeliest_N) < 0:
        raise not_finite()
    results, place = [], 0
    for draft_ids, state in zip(drafts, states, strict=True):
        num_accepted = 0
        for draft_id in draft_ids:
            token_id = likeliest_N[place + num_accepted]
            if token_id != draft_id or token_id in state.end_ids:
                break
            num_accepted += 1
        token_ids = tuple(likeliest_N[place : place + num_accepted + 1])
        if num_accepted < len(draft_ids) and token_ids[-1] == draft_ids[num_accepted]:
            num_accepted += 1  # it ends the answer
        results.append(Verified(token_ids, num_accepted, ()))
        place += 1 + len(draft_ids)
    assert place == len(likeliest_N), f"{len(likeliest_N)} ids for {place} tokens"
    return results


def _walk_all(logits_NV: Tensor, walks: Sequence[_Walk], is_row_by_row: bool) -> None:
    """Round after round all rows that can be drawn now; one is enough where nothing is guided.

    CheckpointError if the logits are not numbers. From a GPU one copy brings sum and ids.
    """
    sums = []
    if logits_NV.is_cpu:
        check_finite(logits_NV, logits_NV.sum().item())
    else:
        sums.append(logits_NV.sum()[None].double())
    going = list(walks)
    while going:
        numbers: list[int] = []
        rows: list[Row] = []
        sizes: list[int] = []
        for walk in going:
            more = walk.rows()
            numbers += range(walk.place, walk.place + len(more))
            rows += more
            sizes.append(len(more))
        ids = choose(logits_NV, numbers, rows, is_row_by_row=is_row_by_row)
        if sums:
            total, *values = torch.cat([*sums, ids.double()]).tolist()
            check_finite(logits_NV, total)
            sums = []
        else:
            values = ids.tolist()
        chosen = iter(map(int, values))
        for walk, size in zip(going, sizes, strict=True):
            walk.take([next(chosen) for _ in range(size)])
        going = [walk for walk in going if not walk.is_over]


class _Walk:
    """One answer's way through its rows, of which the first has the number `first`.

    Without a guide all its rows are drawn at once, each as if the drafts before it were accepted.
    """

    def __init__(self, first: int, draft_ids: Sequence[int], state: SamplingState) -> None:
        self._first, self._draft_ids, self._state = first, draft_ids, state
        self._guide = None if state.guide is None else state.guide.fork()
        self._token_ids: list[int] = []
        self._num_accepted = self._num_refused = 0
        self.is_over = False

    @property
    def place(self) -> int:
        """The row that is drawn next."""
        return self._first + len(self._token_ids)

    def rows(self) -> list[Row]:
        """How the rows from `place` on are drawn now."""
        state, drafts = self._state, self._draft_ids
        if self._guide is None:
            return [state.row(drafts[:offset]) for offset in range(1 + len(drafts))]
        row = state.row(self._token_ids, self._guide)
        for _ in range(self._num_refused):
            # Its later digits are as random, and say nothing of the token that was refused.
            row = replace(row, uniform=row.uniform * REDRAW % 1.0)
        return [row]

    def take(self, chosen: Sequence[int]) -> None:
        """What those rows chose: tokens up to the first that is no accepted draft."""
        for token_id in chosen:
            if self._guide is not None and not self._guide.admits(token_id):
                self._num_refused += 1
                return
            offset, self._num_refused = len(self._token_ids), 0
            self._token_ids.append(token_id)
            if self._guide is not None:
                self._guide.put(token_id)
            is_draft = offset < len(self._draft_ids) and token_id == self._draft_ids[offset]
            self._num_accepted += is_draft
            if not is_draft or token_id in self._state.end_ids:
                self.is_over = True
                return

    def rewind(self) -> None:
        """Leaves the answer's guide where it was."""
        if self._guide is not None:
            self._guide.rewind()

    def verified(self, logits_NV: Tensor, is_row_by_row: bool) -> Verified:
        logprobs: tuple[TokenLogprob, ...] = ()
        state, token_ids = self._state, self._token_ids
        if state.params.logprobs is not None:
            logprobs = token_logprobs(
                logits_NV[self._first : self._first + len(token_ids)],
                token_ids,
                state.params.logprobs,
                state.vocab_size,
                is_row_by_row=is_row_by_row,
            )
        return Verified(tuple(token_ids), self._num_accepted, logprobs, self._guide)
