"""Logits of the shipped model's own dialogues, from the engine's runner and from llama.cpp, and how
far they are from others.
"""

# T tokens of a text, V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from rorqual.corpus_writer import GENERATORS
from rorqual.engine.cache_formats import CacheDtype
from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

Way = Literal["prompt", "one by one"]
BLOCK_TOKENS, TOGETHER = 64, 16
SEED = 12


class Gap:
    """How far some logits are from those wanted, over all tokens that were added."""

    def __init__(self) -> None:
        self._squares = self._wanted_squares = 0.0
        self._divergences: list[Tensor] = []
        self._errors: list[Tensor] = []

    def add(self, logits_TV: Tensor, wanted_TV: Tensor) -> None:
        a, b = logits_TV.double(), wanted_TV.double()
        self._squares += float((a - b).square().sum())
        self._wanted_squares += float(b.square().sum())
        self._errors.append((a - b).norm(dim=-1) / b.norm(dim=-1))
        log_p, log_q = b.log_softmax(-1), a.log_softmax(-1)
        self._divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))

    @property
    def relative(self) -> float:
        """||a - b|| / ||b||."""
        return float((self._squares / self._wanted_squares) ** 0.5)

    @property
    def median_relative(self) -> float:
        """Of a token: what no choice of other experts disturbs."""
        return float(torch.cat(self._errors).median())

    @property
    def divergences(self) -> Tensor:
        """KL(wanted || a) of each token, in nats."""
        return torch.cat(self._divergences)

    @property
    def mean_kl(self) -> float:
        return float(self.divergences.mean())

    @property
    def mean_kl_error(self) -> float:
        """Of the mean: few tokens, which choose other experts, are most of it."""
        return float(self.divergences.std() / len(self.divergences) ** 0.5)

    @property
    def median_kl(self) -> float:
        return float(self.divergences.median())


def gap_of(logits: Iterable[Tensor], wanted: Iterable[Tensor]) -> Gap:
    """Of texts one after the other."""
    gap = Gap()
    for logits_TV, wanted_TV in zip(logits, wanted, strict=True):
        gap.add(logits_TV, wanted_TV)
    return gap


def dialogues(tokenizer: Tokenizer, num_tokens: int, longest: int = 256) -> list[list[int]]:
    """Conversations as the shipped model learned them, with at least so many tokens in all."""
    texts: list[list[int]] = []
    total = 0
    for document in GENERATORS["dialogues"](SEED, num_tokens):
        assert document.messages is not None
        ids = tokenizer.encode_chat(document.messages, add_generation_prompt=False)[:longest]
        texts.append(ids)
        total += len(ids)
        if total >= num_tokens:
            break
    return texts


@torch.no_grad()
def model_logits(model: DeepseekV3, texts: Sequence[list[int]]) -> Iterator[Tensor]:
    """Each text's (T, V), from the modules and without a cache."""
    for ids in texts:
        yield model(torch.tensor([ids]))[0]


def engine_logits(
    model: DeepseekV3, texts: Sequence[list[int]], way: Way, kv: CacheDtype = "auto"
) -> Iterator[Tensor]:
    """Each text's (T, V), from steps as the engine makes them: whole prompts, or one token of each
    of some texts at a time.
    """
    num_blocks = -(-max(map(len, texts)) // BLOCK_TOKENS)
    shape = TOGETHER * num_blocks, BLOCK_TOKENS
    like = torch.zeros(0, dtype=torch.float32)
    runner = Runner(model, PagedLatentCache(model.config, shape, kv, like))
    blocks = [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(TOGETHER)]
    if way == "prompt":
        for ids in texts:
            yield runner.logits(runner.run([Span(ids, 0, blocks[0])])[0])
        return
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        rows: list[list[Tensor]] = [[] for _ in some]
        for place in range(max(map(len, some))):
            running = [i for i, ids in enumerate(some) if place < len(ids)]
            spans = [Span(some[i][place : place + 1], place, blocks[i]) for i in running]
            for i, h_1D in zip(running, runner.run(spans), strict=True):
                rows[i].append(h_1D)
        yield from (runner.logits(torch.cat(h)) for h in rows)
