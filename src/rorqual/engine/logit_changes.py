"""What is done to logits before sampling: many rows at once, each by its own settings.

A setting touches few ids of a row, so only these are read and written; a grammar's mask alone goes
over the vocabulary. No row has a part in another's result.
"""

# N rows, R rows with one setting, E entries (one id of one row), V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.ops.device import tensor_on


class TokenCounts:
    """How often each token has come, with 0 for those of the prompt alone."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._ids = np.fromiter(dict.fromkeys(prompt_ids), dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place_of = {int(token_id): place for place, token_id in enumerate(self._ids)}

    def add(self, token_id: int) -> None:
        place = self._place_of.setdefault(token_id, len(self._place_of))
        if place == len(self._ids):
            num_more = max(16, len(self._ids))
            self._ids = np.pad(self._ids, (0, num_more))
            self._counts = np.pad(self._counts, (0, num_more))
        self._ids[place] = token_id
        self._counts[place] += 1

    def after(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(E,) ids and their counts, if these tokens came too."""
        num_known = len(self._place_of)
        ids_E, counts_E = self._ids[:num_known].copy(), self._counts[:num_known].copy()
        if token_ids:
            more, counts = np.unique(np.asarray(token_ids), return_counts=True)
            places = [self._place_of.get(int(token_id), -1) for token_id in more]
            is_new = np.asarray(places) < 0
            counts_E[np.asarray(places)[~is_new]] += counts[~is_new]
            ids_E = np.concatenate([ids_E, more[is_new]])
            counts_E = np.concatenate([counts_E, counts[is_new].astype(np.float32)])
        return torch.from_numpy(ids_E), torch.from_numpy(counts_E)


@dataclass(frozen=True, eq=False)
class LogitChanges:
    """Of one row, in this order (`SamplingParams` says what they mean): `allowed_V` leaves tokens,
    penalties for `seen` ids and their counts, `bias` is added to ids, `banned_ids` go, all but
    `only_ids` go, `early_ids` go. What would leave no token is left out, one by one.
    """

    allowed_V: Tensor | None = None
    seen: tuple[Tensor, Tensor] | None = None
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Repetition, frequency, presence."""
    bias: tuple[Tensor, Tensor] | None = None
    banned_ids: Tensor | None = None
    only_ids: Tensor | None = None
    early_ids: Tensor | None = None

    @property
    def is_any(self) -> bool:
        ids = self.bias, self.banned_ids, self.only_ids, self.early_ids
        return any(value is not None for value in (self.allowed_V, self.seen, *ids))


def change(logits_NV: Tensor, changes: Sequence[LogitChanges]) -> None:
    """In place. The rows are one block of memory."""
    allowed = {n: c.allowed_V for n, c in enumerate(changes) if c.allowed_V is not None}
    if allowed:
        rows = tensor_on(logits_NV.device, list(allowed), torch.int64)
        allowed_RV = torch.stack(list(allowed.values())).to(logits_NV.device)
        logits_NV[rows] = logits_NV[rows].masked_fill(~allowed_RV, -torch.inf)
    _penalise(logits_NV, {n: c for n, c in enumerate(changes) if c.seen is not None})
    bias = {n: c.bias for n, c in enumerate(changes) if c.bias is not None}
    if bias:
        places_E, _ = _places(logits_NV, {n: ids for n, (ids, _) in bias.items()})
        biases_E = torch.cat([values for _, values in bias.values()]).to(logits_NV.device)
        logits_NV.view(-1)[places_E] += biases_E
    _exclude(logits_NV, {n: c.banned_ids for n, c in enumerate(changes)})
    _leave_only(logits_NV, {n: c.only_ids for n, c in enumerate(changes)})
    _exclude(logits_NV, {n: c.early_ids for n, c in enumerate(changes)})


def _places(logits_NV: Tensor, ids_of: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """(E,) places of these ids in all rows laid end to end, and which of the dict's rows each is
    in.
    """
    device, num_ids = logits_NV.device, logits_NV.shape[1]
    starts = torch.tensor(list(ids_of)) * num_ids
    sizes = torch.tensor([len(ids) for ids in ids_of.values()])
    rows_E = torch.arange(len(ids_of)).repeat_interleave(sizes)
    return (torch.cat(list(ids_of.values())) + starts[rows_E]).to(device), rows_E.to(device)


def _penalise(logits_NV: Tensor, changes: dict[int, LogitChanges]) -> None:
    if not changes:
        return
    seen = {n: c.seen for n, c in changes.items() if c.seen is not None}
    places_E, rows_E = _places(logits_NV, {n: ids for n, (ids, _) in seen.items()})
    counts_E = torch.cat([counts for _, counts in seen.values()]).to(logits_NV.device)
    penalties_R3 = tensor_on(
        logits_NV.device, [c.penalties for c in changes.values()], torch.float32
    )
    repetition_E, frequency_E, presence_E = penalties_R3[rows_E].unbind(-1)
    flat = logits_NV.view(-1)
    x_E = flat[places_E]
    x_E = torch.where(x_E > 0, x_E / repetition_E, x_E * repetition_E)
    flat[places_E] = x_E - frequency_E * counts_E - presence_E * (counts_E > 0)


def _exclude(logits_NV: Tensor, ids_of: dict[int, Tensor | None]) -> None:
    """Takes these ids out of rows that have others."""
    known = {n: ids for n, ids in ids_of.items() if ids is not None and len(ids)}
    if not known:
        return
    places_E, rows_E = _places(logits_NV, known)
    flat = logits_NV.view(-1)
    before_E = flat[places_E]
    flat[places_E] = -torch.inf
    is_left_N = logits_NV.amax(-1) > -torch.inf
    is_left_R = is_left_N[tensor_on(logits_NV.device, list(known), torch.int64)]
    flat[places_E] = before_E.masked_fill(is_left_R[rows_E], -torch.inf)


def _leave_only(logits_NV: Tensor, ids_of: dict[int, Tensor | None]) -> None:
    """Takes all but these ids out of rows that have one of them."""
    known = {n: ids for n, ids in ids_of.items() if ids is not None}
    if not known:
        return
    places_E, rows_E = _places(logits_NV, known)
    flat = logits_NV.view(-1)
    before_E = flat[places_E]
    best_R = before_E.new_full((len(known),), -torch.inf).scatter_reduce(
        0, rows_E, before_E, "amax"
    )
    rows = tensor_on(logits_NV.device, list(known), torch.int64)[best_R > -torch.inf]
    logits_NV[rows] = -torch.inf
    flat[places_E] = before_E
