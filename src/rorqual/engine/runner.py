"""The runner: spans of text in, hidden states and logits out.

It knows no request and no rank: a model that is wrapped for several ranks is called as any other.
Where the model runs whole (`model/fused.py`) a step is one call.
"""

# M tokens of a step, T tokens of a span, N rows, D hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.engine.flat_step import Span, flat_step, joined, paged_tokens
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.sampler import likeliest
from rorqual.engine.verify import Scores
from rorqual.model import DeepseekV3
from rorqual.model.dispatch import Dispatcher, LocalDispatcher
from rorqual.model.fused import FusedLayers, Wanted


class Ran(NamedTuple):
    """Hidden states of each span, (T, D), and scores of the rows that were to be scored."""

    hidden: list[Tensor]
    scores: Scores


class Runner:
    """Runs a model over flat steps; the latents of a span's tokens go into its slots.

    `num_ids`: of the model's vocabulary, the ids that exist. `is_row_by_row` says whether rows of
    logits must not meet in one operator either.
    """

    is_row_by_row = False

    def __init__(
        self, model: DeepseekV3, cache: PagedLatentCache, num_ids: int | None = None
    ) -> None:
        self._model, self._cache = model, cache
        self._num_ids = model.config.vocab_size if num_ids is None else num_ids
        self._device = cache.device
        self._dispatcher: Dispatcher = LocalDispatcher()

    def run(self, spans: Sequence[Span]) -> list[Tensor]:
        """The main model's hidden states of each span, (T, D). Some span has a token."""
        return self.step(spans, [0] * len(spans)).hidden

    def step(
        self, spans: Sequence[Span], num_scored: Sequence[int], *, needs_logits: bool = True
    ) -> Ran:
        """The main model over these spans; the last `num_scored` tokens of each are to be scored,
        with logits where these are needed.
        """
        if (call := self._fused(0)) is not None:
            return self._run_fused(call, 0, spans, num_scored, needs_logits=needs_logits)
        hidden = self._run_modules(spans)
        return Ran(hidden, self._scores(hidden, num_scored))

    def run_mtp(self, depth: int, spans: Sequence[Span], rows: Sequence[Tensor]) -> list[Tensor]:
        """An MTP depth's hidden states, (T, D) of each span.

        `rows` (T, D) are the hidden states of the depth before. The one beside the token in slot s
        is that of position s - depth.
        """
        if (call := self._fused(depth)) is not None:
            return self._run_fused(call, depth, spans, [0] * len(spans), rows).hidden
        return self._run_mtp_module(depth, spans, rows)

    def draft(
        self, depth: int, spans: Sequence[Span], rows: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[int]]:
        """As `run_mtp`, and the likeliest id behind each span; any where logits are not finite, for
        `verify` takes none on trust.
        """
        if (call := self._fused(depth)) is not None:
            ran = self._run_fused(call, depth, spans, [1] * len(spans), rows, needs_logits=False)
        else:
            hidden = self.run_mtp(depth, spans, rows)
            ran = Ran(hidden, self._scores(hidden, [1] * len(spans)))
        logits_NV, likeliest_N = ran.scores
        if likeliest_N is None:
            assert logits_NV is not None, "each span has a last row"
            likeliest_N = likeliest(logits_NV[:, : self._num_ids]).tolist()
        return ran.hidden, [max(id_, 0) for id_ in likeliest_N]

    @torch.inference_mode()
    def logits(self, h_ND: Tensor) -> Tensor:
        """(N, V) float32."""
        return self._model.head(h_ND)

    def _fused(self, depth: int) -> FusedLayers | None:
        """The call of the main layers or of an MTP depth, where there is one."""
        fused = self._model.fused
        return None if fused is None else fused.call(depth)

    def _run_fused(
        self,
        call: FusedLayers,
        depth: int,
        spans: Sequence[Span],
        num_scored: Sequence[int],
        rows: Sequence[Tensor] | None = None,
        *,
        needs_logits: bool = True,
        is_together: bool = True,
    ) -> Ran:
        config = self._model.config
        tokens = paged_tokens(spans, self._cache, config, depth, is_together=is_together)
        states_MD = None if rows is None else joined(rows)
        sizes = [len(span.token_ids) for span in spans]
        wanted = Wanted(_last(sizes, num_scored), self._num_ids, needs_logits)
        h_MD, likeliest_N, logits_NV = call(tokens, states_MD, wanted)
        hidden = [h_MD] if len(spans) == 1 else list(h_MD.split(sizes))
        if likeliest_N is None:
            return Ran(hidden, self._scores(hidden, num_scored))
        return Ran(hidden, Scores(logits_NV, likeliest_N))

    def _scores(self, hidden: Sequence[Tensor], num_scored: Sequence[int]) -> Scores:
        rows = [h[len(h) - num :] for h, num in zip(hidden, num_scored, strict=True) if num]
        return Scores(self.logits(joined(rows)) if rows else None)

    @torch.inference_mode()
    def _run_mtp_module(
        self, depth: int, spans: Sequence[Span], rows: Sequence[Tensor]
    ) -> list[Tensor]:
        step = flat_step(spans, self._cache, self._model.config, self._device, depth)
        h_1MD = joined([rows[i] for i in step.order])[None]
        model_step = self._model.model.cached_step(step.positions_1M, step.view)
        h_1MD = self._model.mtp_hidden(depth, h_1MD, step.tokens_1M, model_step)
        return step.split(h_1MD, spans)

    @torch.inference_mode()
    def _run_modules(self, spans: Sequence[Span], *, is_together: bool = True) -> list[Tensor]:
        step = flat_step(
            spans, self._cache, self._model.config, self._device, is_together=is_together
        )
        model_step = self._model.model.cached_step(step.positions_1M, step.view, self._dispatcher)
        return step.split(self._model.hidden(step.tokens_1M, model_step), spans)


def _last(sizes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """The places of each span's last tokens, in the row of all."""
    places, stop = list[int](), 0
    for size, count in zip(sizes, counts, strict=True):
        stop += size
        places += range(stop - count, stop)
    return places
