"""Tiny models of the engine's tests, and greedy decoding in closed form."""

from __future__ import annotations

import torch

from rorqual.engine.draft_policy import FixedDrafts
from rorqual.engine.paged_cache import block_bytes
from rorqual.model import DeepseekV3, build
from rorqual.tokenizer import Tokenizer
from small import SPOKEN

BLOCK_TOKENS = 16
ALWAYS = FixedDrafts(100)
"""As many drafts as `speculate` allows in every step, so that no test hangs on time."""
CONFIG = SPOKEN.with_changes(max_position_embeddings=700, initializer_range=0.1)


def guessing(num_depths: int) -> DeepseekV3:
    """A model whose MTP depths are often right: a token's successor hangs mostly on the token.

    All blocks whisper beside the embedding, and `eh_proj` passes the embedding on.
    """
    model = build(CONFIG.with_changes(num_nextn_predict_layers=num_depths), seed=5).eval()
    dim = CONFIG.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.mul_(0.12)
            if name.endswith("eh_proj.weight"):
                parameter.mul_(0.02)[:, :dim].add_(torch.eye(dim) * 0.1)
    return model


@torch.no_grad()
def greedy_loop(
    model: DeepseekV3, tokenizer: Tokenizer, prompt: list[int], count: int
) -> list[int]:
    """The oracle in closed form: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits_V = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :]


def memory_of(model: DeepseekV3, num_blocks: int, num_depths: int = 0) -> int:
    """Bytes of a cache of so many blocks."""
    size = block_bytes(model.config, BLOCK_TOKENS, "float32", torch.float32, num_depths)
    return num_blocks * size
