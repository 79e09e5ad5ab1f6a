"""What an engine may be told when it is made: each option with its default and what it means."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rorqual.engine.cache_formats import CacheDtype, check_cache_dtype
from rorqual.engine.draft_policy import DraftPolicy
from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """For `Engine(model, tokenizer, options)`; or by names, as in `Engine("DIR", speculate=2)`."""

    dtype: str = "auto"
    """How a folder's weights run: auto, float32, bfloat16, stored, native or int8."""
    device: str | torch.device = "auto"
    """Where a folder's weights go: auto, cpu, cuda or cuda:N. A model that is there stays where it
    is, with all that the engine keeps."""
    speculate: int = 0
    """The most tokens that are drafted a step, as many as pay unless `draft_policy` says otherwise.
    """
    max_batch: int = 32
    """Answers that run side by side."""
    max_step_tokens: int = 512
    """Tokens of a step, of prompts, answers and drafts together; four times as many of a prompt
    that is alone, where blocks run whole in C++."""
    cache_memory: int | float | None = None
    """Bytes (int) or a share of the free memory (float); None: what `max_batch` answers of the
    model's context take, or half of the free memory. Where the cache is smaller than the model's
    context, it is the context's limit."""
    kv_cache_dtype: CacheDtype = "auto"
    """How latents are stored: auto (as the model computes; bf16 where weights run in the bytes of
    their file), float32, bf16, fp8 or q8."""
    block_tokens: int = 16
    """Tokens of a block of the cache."""
    use_prefix_cache: bool = True
    """Whether beginnings that were computed before are used again."""
    is_batch_invariant: bool = False
    """Whether an answer is the same in any company, to the last bit; slower."""
    max_model_len: int | None = None
    """The context's limit, if less than the model's."""
    draft_policy: DraftPolicy | None = None
    """How many tokens are drafted; None: as many as pay, by measurement."""
    kernels: str = "auto"
    """auto, the fastest that this machine has for what the model stores, or one of
    `ops.kernels.NAMES`, to compare. They stay with the model."""

    def check(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """UsageError for what has no meaning with a model of this shape."""
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(
                "the tokenizer does not belong to the model",
                found=f"{tokenizer.vocab_size} ids",
                expected=f"at most the model's vocabulary of {config.vocab_size}",
            )
        for name in ("max_batch", "max_step_tokens", "block_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name} is out of range", found=value, expected="1 or more")
        self._check_speculation(config.num_nextn_predict_layers)
        check_cache_dtype(self.kv_cache_dtype)
        self.max_positions(config.max_position_embeddings)

    def _check_speculation(self, num_modules: int) -> None:
        if self.speculate < 0:
            raise UsageError(
                "speculate is out of range", found=self.speculate, expected="0 or more"
            )
        if self.speculate and not num_modules:
            raise UsageError(
                "the model has no MTP module to speculate with",
                found=f"speculate {self.speculate}",
                fix="leave out speculation, or use a checkpoint with num_nextn_predict_layers",
            )
        if self.speculate and self.block_tokens < num_modules:
            raise UsageError(
                "blocks are too small to speculate with",
                found=f"{self.block_tokens} tokens",
                expected=f"at least the {num_modules} MTP modules",
            )

    def max_positions(self, limit: int) -> int:
        """The context's limit, of a model whose own is `limit`; UsageError for more than that."""
        if self.max_model_len is None:
            return limit
        if not 2 <= self.max_model_len <= limit:
            raise UsageError(
                "max_model_len is out of range",
                found=self.max_model_len,
                expected=f"2 to the model's context of {limit}",
            )
        return self.max_model_len
