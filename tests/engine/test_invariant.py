"""Oracle: the bits of the same answer alone."""

from __future__ import annotations

import pytest
import torch
from small_models import ALWAYS

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.flat_step import Span
from rorqual.engine.invariant import ROWS, InvariantRunner, TileDispatcher
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.model import DeepseekV3
from rorqual.model.moe import MoE
from rorqual.tokenizer import Tokenizer
from small import relative_error

FLOAT32_RELATIVE = 1e-5


def runner(model: DeepseekV3) -> InvariantRunner:
    like = model.model.embed_tokens.weight.detach()
    cache = PagedLatentCache(model.config, (60, 4), "float32", like)
    return InvariantRunner(model, cache, spare_block=59)


@pytest.mark.parametrize("num_threads", [1, 2])
@torch.no_grad()
def test_the_bits_hang_on_no_company(
    model: DeepseekV3, prompts: list[list[int]], num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    text = prompts[2]
    alone = runner(model)
    h_TD = alone.run([Span(text, 0, list(range(23)))])[0]
    assert relative_error(h_TD, model.hidden(torch.tensor([text]))[0]) < FLOAT32_RELATIVE
    others = [Span(prompts[4], 0, list(range(30, 39))), Span(prompts[1], 0, [40, 44])]
    crowded, parts = runner(model), []
    for start, stop in ((0, 20), (20, 21), (21, 80), (80, 90)):
        blocks = list(range(22, -1, -1))
        mixed = [others[0], Span(text[start:stop], start, blocks), others[1]]
        parts.append(crowded.run(mixed)[1])
    assert torch.equal(torch.cat(parts), h_TD)
    logits = alone.logits(h_TD)
    assert torch.equal(torch.cat([alone.logits(row[None]) for row in h_TD]), logits)


def test_engines_agree_in_every_bit(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=8, logprobs=4, ignore_eos=True)
    alone = Engine(model, tokenizer, is_batch_invariant=True, max_batch=1)
    crowd = Engine(
        model,
        tokenizer,
        is_batch_invariant=True,
        max_step_tokens=37,
        speculate=1,
        draft_policy=ALWAYS,
    )
    assert alone.generate(prompts, params) == crowd.generate(prompts, params)
    stats = crowd.stats()
    assert stats.num_free_blocks == stats.num_blocks


@torch.no_grad()
def test_tiles_change_no_expert(model: DeepseekV3) -> None:
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    x = torch.randn(1, 50, model.config.hidden_size)
    step = model.model.step(torch.zeros(1, 50, dtype=torch.int64))
    tiles = TileDispatcher()
    counts_E = tiles.dispatch(x[0], layer.gate(x[0]), layer.num_experts).counts_E
    assert not (counts_E % ROWS).any()
    tiled = layer(x, step._replace(dispatcher=tiles))
    torch.testing.assert_close(tiled, layer(x, step), rtol=1e-5, atol=1e-6)
