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
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.logprobs import TokenLogprob, token_logprobs
from rorqual.engine.sampler import check_finite, draw, pick_rows
from rorqual.engine.sampling_state import SamplingState
from rorqual.ops.device import tensor_on

REDRAW = 32.0
"""A random number of 53 bits is good for eight draws more, each of 2^-5 at the coarsest."""


@dataclass(frozen=True)
class Verified:
    """Tokens that an answer takes in one step: `num_accepted` drafts and, unless one of these
    ended the answer, a new one.

    `logprobs` has one entry a token if the request asked for them.
    """

    token_ids: tuple[int, ...]
    num_accepted: int
    logprobs: tuple[TokenLogprob, ...]


def verify(
    logits_NV: Tensor,
    drafts: Sequence[Sequence[int]],
    states: Sequence[SamplingState],
    *,
    is_row_by_row: bool = False,
) -> list[Verified]:
    """Chooses the next tokens of each answer, and moves its state past them.

    Answer i owns the next `1 + len(drafts[i])` rows of float32 logits; its row j stands after its
    first j drafts. CheckpointError if the logits are not numbers. Ids beyond the tokenizer, rows
    that only round the model's shape, are never chosen. `is_row_by_row`: no row's sums depend on
    the others', to the last bit.
    """
    assert len(drafts) == len(states), "one list of drafts for each answer"
    if not states:
        return []
    starts = [0]
    for draft_ids in drafts:
        starts.append(starts[-1] + 1 + len(draft_ids))
    assert len(logits_NV) == starts[-1], f"{len(logits_NV)} rows of logits for {starts[-1]} tokens"
    logits_NV = logits_NV[:, : states[0].vocab_size]
    plain_N = _choose_plain(logits_NV, starts, states, is_row_by_row)
    is_plain = all(state.params.is_plain for state in states)
    host_NV = logits_NV if is_plain else logits_NV.cpu()  # one copy for all that need it
    results = []
    for start, draft_ids, state in zip(starts[:-1], drafts, states, strict=True):
        token_ids, num_accepted = _walk(host_NV[start:], plain_N[start:], draft_ids, state)
        logprobs: tuple[TokenLogprob, ...] = ()
        if state.params.logprobs is not None:
            rows_NV = logits_NV[start : start + len(token_ids)]
            logprobs = token_logprobs(
                rows_NV,
                token_ids,
                state.params.logprobs,
                state.vocab_size,
                is_row_by_row=is_row_by_row,
            )
        results.append(Verified(tuple(token_ids), num_accepted, logprobs))
    return results


def _walk(
    logits_NV: Tensor,
    plain_N: Sequence[int | None],
    draft_ids: Sequence[int],
    state: SamplingState,
) -> tuple[list[int], int]:
    """(committed ids, how many of them are drafts)."""
    token_ids: list[int] = []
    for offset in range(1 + len(draft_ids)):
        token_id = plain_N[offset]
        if token_id is None:
            uniform = state.uniform() if state.params.temperature > 0 else 0.0
            token_id = draw(state.adjust(logits_NV[offset]), state.params, uniform)
            while not state.admits(token_id):
                # Its later digits are as random, and say nothing of the token that was refused.
                uniform = uniform * REDRAW % 1.0
                token_id = draw(state.adjust(logits_NV[offset]), state.params, uniform)
        token_ids.append(token_id)
        state.commit(token_id)
        is_draft = offset < len(draft_ids) and token_id == draft_ids[offset]
        if not is_draft:
            return token_ids, offset
        if token_id in state.end_ids:
            return token_ids, offset + 1
    raise AssertionError("the row after the last draft has none of its own")


def _choose_plain(
    logits_NV: Tensor,
    starts: Sequence[int],
    states: Sequence[SamplingState],
    is_row_by_row: bool,
) -> list[int | None]:
    """What each row chooses, where that depends on nothing before it: all these rows at once.

    CheckpointError if the logits are not numbers. From a GPU one copy brings both.
    """
    greedy: list[int] = []
    drawn: list[int] = []
    temperatures: list[float] = []
    uniforms: list[float] = []
    for index, state in enumerate(states):
        rows = range(starts[index], starts[index + 1])
        if not state.params.is_plain:
            continue
        if state.params.temperature == 0:
            greedy += rows
        else:
            drawn += rows
            temperatures += [state.params.temperature] * len(rows)
            uniforms += [state.uniform(offset) for offset in range(len(rows))]
    chosen_N: list[int | None] = [None] * len(logits_NV)
    read = [logits_NV.sum()[None].double()]
    if greedy:
        read.append(_take(logits_NV, greedy).argmax(-1).double())
    if drawn:
        rows_NV = _take(logits_NV, drawn)
        read.append(pick_rows(rows_NV, temperatures, uniforms, is_row_by_row).double())
    total, *ids = torch.cat(read).tolist()
    check_finite(logits_NV, total)
    for row, token_id in zip([*greedy, *drawn], ids, strict=True):
        chosen_N[row] = int(token_id)
    return chosen_N


def _take(logits_NV: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == len(logits_NV):
        return logits_NV
    return logits_NV.index_select(0, tensor_on(logits_NV.device, rows, torch.int64))
