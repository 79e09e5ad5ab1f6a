"""The same text in any company: what decides a token comes out of operators of one shape.

How a matrix product sums depends on its shape, so a row's last bits depend on the rows beside it.
Here the model always runs `ROWS` tokens, dummies among them, each attending alone to a copy of its
own past, absorbed; an expert that has any row gets `ROWS` of them. Drafts need no such care: they
change what is computed, never what is accepted. It holds for one machine and number of threads.
"""

# M tokens, N rows, D hidden size, E experts

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Ran, Runner
from rorqual.model import DeepseekV3
from rorqual.model.dispatch import Dispatched, LocalDispatcher
from rorqual.model.router import Routing

# Choice: whole vectors in every elementwise operator, whatever the width.
ROWS = 32


class InvariantRunner(Runner):
    """A runner whose results do not depend on what runs beside them.

    The block `spare_block` belongs to nobody: dummies write there.
    """

    is_row_by_row = True

    def __init__(
        self,
        model: DeepseekV3,
        cache: PagedLatentCache,
        spare_block: int,
        num_ids: int | None = None,
    ) -> None:
        super().__init__(model, cache, num_ids)
        self._dispatcher = TileDispatcher()
        self._dummy = Span([0], 0, [spare_block])

    def step(
        self, spans: Sequence[Span], num_scored: Sequence[int], *, needs_logits: bool = True
    ) -> Ran:
        if (call := self._fused(0)) is not None:
            # There rows never meet: each is summed by itself, in one way.
            return self._run_fused(
                call, 0, spans, num_scored, needs_logits=needs_logits, is_together=False
            )
        tokens = [
            Span([token_id], slot, span.blocks)
            for span in spans
            for slot, token_id in enumerate(span.token_ids, span.start)
        ]
        rows: list[Tensor] = []
        for first in range(0, len(tokens), ROWS):
            tile = tokens[first : first + ROWS]
            padded = [*tile, *[self._dummy] * (ROWS - len(tile))]
            rows += self._run_modules(padded, is_together=False)[: len(tile)]
        hidden = list(torch.cat(rows).split([len(span.token_ids) for span in spans]))
        return Ran(hidden, self._scores(hidden, num_scored))

    @torch.inference_mode()
    def logits(self, h_ND: Tensor) -> Tensor:
        call = self._fused(0)
        if call is not None and call.has_head:
            return super().logits(h_ND)
        padded_ND = F.pad(h_ND, (0, 0, 0, -len(h_ND) % ROWS))
        logits = [self._model.head(tile) for tile in padded_ND.split(ROWS)]
        return torch.cat(logits)[: len(h_ND)]


class TileDispatcher(LocalDispatcher):
    """Fills the rows of each expert that has some up to `ROWS`, or a multiple, with zeros."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        plain = super().dispatch(x_TD, routing, num_experts)
        tiled_E = -(-plain.counts_E // ROWS) * ROWS
        shifts_E = (tiled_E - plain.counts_E).cumsum(0) - (tiled_E - plain.counts_E)
        num_rows, num_tiled = len(plain.order_N), int(tiled_E.sum())
        places_N = torch.arange(num_rows, device=x_TD.device)
        places_N = places_N + shifts_E.repeat_interleave(plain.counts_E)
        is_free = torch.ones(num_tiled, dtype=torch.bool, device=x_TD.device)
        is_free[places_N] = False
        # Zeros stand behind all (token, choice) pairs, where `combine` does not look.
        order_N = torch.empty(num_tiled, dtype=torch.int64, device=x_TD.device)
        order_N[places_N] = plain.order_N
        order_N[is_free] = torch.arange(num_rows, num_tiled, device=x_TD.device)
        return Dispatched(
            x_TD.new_zeros(num_tiled, x_TD.shape[1]).index_copy(0, places_N, plain.rows_ND),
            tiled_E,
            plain.weights_N.new_zeros(num_tiled).index_copy(0, places_N, plain.weights_N),
            order_N,
            tile_rows=ROWS,
        )
