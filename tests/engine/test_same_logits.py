"""The same weights give the same logits, whoever asks: with gradients, without, and in the engine.

Oracle: each other, on the bundled model, which is trained. `benchmarks/logit_gap.py` prints the
same gaps in bfloat16, where the ways round differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3
from rorqual.weights import ModelFolder
from small import relative_error

FLOAT32_RELATIVE = 1e-5
TEXT = "The whale swims in the sea. What is 12 + 30? It is 42, and a fox saw a crow."


def logits_by_engine(model: DeepseekV3, ids: list[int], chunks: list[int]) -> Tensor:
    """The text in chunks of these sizes, in turns, as prompts and answers come."""
    like = model.model.embed_tokens.weight.detach()
    runner = Runner(model, PagedLatentCache(model.config, (16, 16), "auto", like))
    rows, start = [], 0
    while start < len(ids):
        size = chunks[len(rows) % len(chunks)]
        rows += [runner.run([Span(ids[start : start + size], start, list(range(15)))])[0]]
        start += size
    return runner.logits(torch.cat(rows))


def test_float32_logits_are_the_same_on_every_way() -> None:
    folder = ModelFolder.find("tiny")
    model = folder.load_model("float32")
    ids = folder.load_tokenizer().encode(TEXT, bos=True)
    with torch.enable_grad():
        by_trainer = model(torch.tensor([ids]))[0]
    assert by_trainer.requires_grad
    by_trainer = by_trainer.detach()
    with torch.no_grad():
        assert relative_error(model(torch.tensor([ids]))[0], by_trainer) < FLOAT32_RELATIVE
    for chunks in ([len(ids)], [1], [7, 1, 1, 9]):
        assert relative_error(logits_by_engine(model, ids, chunks), by_trainer) < FLOAT32_RELATIVE
