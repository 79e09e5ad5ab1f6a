"""The runner: spans of text in, hidden states and logits out.

It knows no request and no rank: a model that is wrapped for several ranks is called as any other.
"""

# M tokens of a step, T tokens of a span, N rows, D hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.engine.flat_step import Span, flat_step, joined
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.model import DeepseekV3
from rorqual.model.dispatch import Dispatcher, LocalDispatcher


class Runner:
    """Runs a model over flat steps; the latents of a span's tokens go into its slots.

    `is_row_by_row` says whether rows of logits must not meet in one operator either.
    """

    is_row_by_row = False

    def __init__(self, model: DeepseekV3, cache: PagedLatentCache) -> None:
        self._model, self._cache = model, cache
        self._device = cache.device
        self._dispatcher: Dispatcher = LocalDispatcher()

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> list[Tensor]:
        """The main model's hidden states of each span, (T, D). Some span has a token."""
        return self._run_main(spans)

    @torch.inference_mode()
    def run_mtp(self, depth: int, spans: Sequence[Span], rows: Sequence[Tensor]) -> list[Tensor]:
        """An MTP depth's hidden states, (T, D) of each span.

        `rows` (T, D) are the hidden states of the depth before. The one beside the token in slot s
        is that of position s - depth.
        """
        step = flat_step(spans, self._cache, self._model.config, self._device, depth)
        h_1MD = joined([rows[i] for i in step.order])[None]
        model_step = self._model.model.cached_step(step.positions_1M, step.view)
        h_1MD = self._model.mtp_hidden(depth, h_1MD, step.tokens_1M, model_step)
        return step.split(h_1MD, spans)

    def _run_main(self, spans: Sequence[Span], *, is_together: bool = True) -> list[Tensor]:
        step = flat_step(
            spans, self._cache, self._model.config, self._device, is_together=is_together
        )
        model_step = self._model.model.cached_step(step.positions_1M, step.view, self._dispatcher)
        return step.split(self._model.hidden(step.tokens_1M, model_step), spans)

    @torch.inference_mode()
    def logits(self, h_ND: Tensor) -> Tensor:
        """(N, V) float32."""
        return self._model.head(h_ND)
