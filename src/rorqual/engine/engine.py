"""The engine: many requests through one model, step by step.

A step schedules tokens of many sequences, drafts, runs the model once over all of them, verifies,
and commits. The engine is synchronous and belongs to one thread; nothing is global, so several may
live in one process. `AsyncEngine` puts one behind an asyncio loop.
"""

# T tokens of a span, D hidden size

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from rorqual.engine.answer import Answer
from rorqual.engine.blocks import BlockPool
from rorqual.engine.cache_formats import CacheDtype, check_cache_dtype
from rorqual.engine.draft_policy import DraftPolicy, Outcome, PayingDrafts
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.invariant import InvariantRunner
from rorqual.engine.logprobs import TokenLogprob, token_logprobs
from rorqual.engine.memory import MIN_BLOCKS, budget_bytes, num_blocks
from rorqual.engine.new_weights import replace_weights
from rorqual.engine.offline import Stream, answer_in_order, seeded
from rorqual.engine.paged_cache import PagedLatentCache, block_bytes
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Output, Piece, Request, check_prompt, listed
from rorqual.engine.runner import Runner
from rorqual.engine.scheduler import Limits, Scheduler
from rorqual.engine.segment import Segment
from rorqual.engine.sequence import TokenSequence
from rorqual.engine.speculative import Speculator
from rorqual.engine.stats import EngineStats
from rorqual.engine.verify import verify
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.model.served import use_kernels
from rorqual.ops.device import resolve_device
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder

LOGPROB_ROWS = 64  # rows of logits that exist at once for a prompt's log-probabilities


class Engine:
    """Answers requests with one model: a folder's, or one that is there with its tokenizer.

    At most `speculate` tokens are drafted a step, as many as pay unless `draft_policy` says
    otherwise. `device` (auto, cpu, cuda, cuda:N) is where a folder's weights go; a model that is
    there stays where it is, with all that the engine keeps. `cache_memory` is bytes (int) or a
    share of the free memory (float). Where the cache is smaller than the model's context, it is the
    context's limit. `kernels` is auto, the fastest that this machine has for what the model
    stores, or one of `ops.kernels.NAMES`, to compare; they stay with the model.

    What a seed promises: with `is_batch_invariant` the same text with and without drafts, alone and
    in any company, to the last bit in every dtype, on one machine with one and the same number of
    threads; slower. Without it, up to rounding: more rows in a step sum in another order, which
    matters where two tokens are that close, hardly ever in float32 and now and then in bfloat16.
    """

    def __init__(
        self,
        model: str | Path | DeepseekV3,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str = "auto",
        device: str | torch.device = "auto",
        speculate: int = 0,
        max_batch: int = 32,
        max_step_tokens: int = 512,
        cache_memory: int | float | None = None,
        kv_cache_dtype: CacheDtype = "auto",
        block_tokens: int = 16,
        use_prefix_cache: bool = True,
        is_batch_invariant: bool = False,
        max_model_len: int | None = None,
        draft_policy: DraftPolicy | None = None,
        kernels: str = "auto",
    ) -> None:
        if not isinstance(model, DeepseekV3):
            folder = ModelFolder.find(str(model))
            tokenizer = tokenizer or folder.load_tokenizer()
            model = folder.load_model(dtype, device)
        elif device != "auto" and resolve_device(device) != model.device:
            raise UsageError(
                "the model is on another device",
                found=model.device,
                expected=device,
                fix="move it there first: model.to(device)",
            )
        if tokenizer is None:
            raise UsageError("a model without a folder needs a tokenizer", fix="give it both")
        check_settings(model, tokenizer, speculate, max_batch, max_step_tokens, block_tokens)
        check_cache_dtype(kv_cache_dtype)
        use_kernels(model, kernels)
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        config = model.config
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        max_positions = _max_positions(model, max_model_len)
        num_depths = min(speculate, config.num_nextn_predict_layers)
        size = block_bytes(config, block_tokens, kv_cache_dtype, like.dtype, num_depths)
        wanted = max(max_batch * -(-max_positions // block_tokens), MIN_BLOCKS) * size
        blocks = num_blocks(budget_bytes(cache_memory, wanted, like.device), size)
        self.max_positions = min(max_positions, blocks * block_tokens)
        self._cache = PagedLatentCache(
            config, (blocks + 1, block_tokens), kv_cache_dtype, like, num_depths
        )
        self._pool = BlockPool(blocks)
        limits = Limits(block_tokens, max_batch, max_step_tokens, use_prefix_cache)
        self._scheduler = Scheduler(self._pool, limits)
        # The last block of the cache is not in the pool: it is there for dummy tokens.
        self._runner = (
            InvariantRunner(model, self._cache, spare_block=blocks)
            if is_batch_invariant
            else Runner(model, self._cache)
        )
        self._speculator = Speculator(self._runner, self._cache, tokenizer.vocab_size)
        self._draft_policy = draft_policy or PayingDrafts(speculate)
        self.grammars = GrammarCompiler(tokenizer)
        self._sequences: dict[Answer, TokenSequence] = {}
        self.weights_version = 0
        self._arrivals = count()
        self._block_tokens = block_tokens
        self._num_prompt_tokens = self._num_output_tokens = 0
        self._drafted, self._accepted = [0] * speculate, [0] * speculate

    @property
    def device(self) -> torch.device:
        """Where the model and the cache are."""
        return self.model.device

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """UsageError if no answer to this prompt is possible."""
        check_prompt(prompt_ids, self.model.config.vocab_size, self.max_positions)

    def add(self, request: Request) -> Answer:
        """Queues a request; UsageError if there can be no answer."""
        self.check_prompt(request.prompt_ids)
        answer = Answer(request, self.tokenizer, self.max_positions, self.grammars)
        sequence = TokenSequence(answer, next(self._arrivals), self._block_tokens)
        self._sequences[answer] = sequence
        self._scheduler.add(sequence)
        self._num_prompt_tokens += len(request.prompt_ids)
        return answer

    def warm_up(self) -> None:
        """Does beforehand what the first requests would have to wait for: what grammars need of the
        vocabulary, and kernels for few rows. Any thread may call it.
        """
        self.grammars.warm_up()
        self._runner.warm_up()

    def cancel(self, answer: Answer) -> None:
        """Ends an answer that is not done; its blocks are free at once."""
        sequence = self._sequences.pop(answer, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def update(self, tensors: Mapping[str, Tensor]) -> int:
        """Replaces weights between steps, by the names of `model.state_dict()`; the new version.

        Versions count from 0; an output tells which drew its first token and which its last.
        Answers that run go on with the new weights, over a past that is computed again with them;
        what the prefix cache holds is forgotten. UsageError, with nothing changed, for names or
        shapes that are not the model's, and for weights that run in the bytes of their file.
        """
        replace_weights(self.model, tensors)
        self._scheduler.set_all_back()
        self.weights_version += 1
        return self.weights_version

    def step(self) -> list[tuple[Answer, Piece]]:
        """Runs the model once; what each answer gained.

        Up to the last line no answer changes: a step that fails before can be done again.
        """
        segments = self._scheduler.schedule(self._num_drafts())
        segments = self._speculator.draft(segments)
        segments = self._run(segments)
        segments = self._verify(segments)
        return self._commit(segments)

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_prefix_queried_tokens=scheduler.num_queried_tokens,
            num_prefix_hit_tokens=scheduler.num_hit_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
            drafted=tuple(self._drafted),
            accepted=tuple(self._accepted),
            num_drafts=min(self._draft_policy.num_drafts, len(self._drafted)),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Output]:
        """One output a prompt, in order; `on_progress` is told the number that is done.

        Every prompt is checked first. Prompt i draws from `seed + i`, so its answer does not depend
        on what runs beside it.
        """
        prompts = listed(prompts)
        for prompt_ids in prompts:
            self.check_prompt(prompt_ids)
        outputs = []
        for output in self.generate_each(seeded(prompts, params)):
            outputs.append(output)
            if on_progress is not None:
                on_progress(len(outputs))
        return outputs

    def generate_each(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Outputs in the order of the requests, which are drawn only as there is room."""
        return answer_in_order(self, requests)

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Stream:
        """TokenSequence as it comes; UsageError, at once, if there can be no answer."""
        self.check_prompt(prompt_ids)
        return Stream(self, Request(prompt_ids, params))

    def _num_drafts(self) -> int:
        wanted = self._draft_policy.begin(self._scheduler.num_decoding)
        return min(wanted, len(self._drafted))

    def _run(self, segments: list[Segment]) -> list[Segment]:
        """With their hidden states."""
        if not segments:
            return []
        hidden = self._runner.run([segment.span for segment in segments])
        return [replace(s, hidden_TD=h_TD) for s, h_TD in zip(segments, hidden, strict=True)]

    def _verify(self, segments: list[Segment]) -> list[Segment]:
        """With the new tokens, where they reach the end of their text, and the log-probabilities of
        the prompt's.
        """
        ready = [segment for segment in segments if segment.is_last]
        if not ready:
            return [self._with_prompt_logprobs(segment) for segment in segments]
        logits_NV = self._runner.logits(
            torch.cat([s.hidden_states[s.num_tokens - 1 :] for s in ready])
        )
        results = verify(
            logits_NV,
            [segment.drafts for segment in ready],
            [segment.sequence.answer.state for segment in ready],
            is_row_by_row=self._runner.is_row_by_row,
        )
        verified = {s.sequence: result for s, result in zip(ready, results, strict=True)}
        return [
            replace(self._with_prompt_logprobs(s), verified=verified.get(s.sequence))
            for s in segments
        ]

    def _commit(self, segments: list[Segment]) -> list[tuple[Answer, Piece]]:
        """Hands the results to the sequences and answers; what each answer gained."""
        pieces = []
        for segment in segments:
            sequence, answer, num_kept = (
                segment.sequence,
                segment.sequence.answer,
                segment.num_tokens,
            )
            answer.add_prompt_logprobs(segment.prompt_logprobs)
            if segment.verified is not None:
                piece = answer.commit(segment.verified, len(segment.drafts), self.weights_version)
                pieces.append((answer, piece))
                sequence.token_ids += piece.token_ids
                num_kept += len(piece.token_ids) - 1
                self._count(piece, len(segment.drafts), segment.verified.num_accepted)
            self._speculator.note(segment, num_kept)
            sequence.num_computed = segment.start + num_kept
        self._speculator.follow(segments)
        for sequence in [segment.sequence for segment in segments]:
            self._scheduler.publish(sequence, self._speculator.num_complete(sequence))
            if sequence.answer.finish_reason is not None:
                self.cancel(sequence.answer)
        self._draft_policy.end(
            [Outcome(s.num_drafts, s.num_accepted) for s in segments if s.is_decode],
            is_decode=all(segment.is_decode for segment in segments),
        )
        return pieces

    def _with_prompt_logprobs(self, segment: Segment) -> Segment:
        """With how likely each prompt token was that follows one of these, if that was asked."""
        answer, start, found = segment.sequence.answer, segment.start, list[TokenLogprob]()
        num_top = answer.request.params.prompt_logprobs
        if not answer.needs_prompt_logprobs or num_top is None:
            return segment
        prompt_ids = answer.request.prompt_ids
        stop = min(start + len(segment.hidden_states), len(prompt_ids) - 1)
        for first in range(answer.num_prompt_logprobs - 1, stop, LOGPROB_ROWS):
            last = min(first + LOGPROB_ROWS, stop)
            logits = self._runner.logits(segment.hidden_states[first - start : last - start])
            found += token_logprobs(
                logits,
                list(prompt_ids[first + 1 : last + 1]),
                num_top,
                self.tokenizer.vocab_size,
                is_row_by_row=self._runner.is_row_by_row,
            )
        return replace(segment, prompt_logprobs=found)

    def _count(self, piece: Piece, num_drafted: int, num_accepted: int) -> None:
        self._num_output_tokens += len(piece.token_ids)
        for position in range(num_drafted):
            self._drafted[position] += 1
            self._accepted[position] += position < num_accepted


def check_settings(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    speculate: int,
    max_batch: int,
    max_step_tokens: int,
    block_tokens: int,
) -> None:
    """UsageError for what has no meaning with this model."""
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            "the tokenizer does not belong to the model",
            found=f"{tokenizer.vocab_size} ids",
            expected=f"at most the model's vocabulary of {config.vocab_size}",
        )
    sizes = {
        "max_batch": max_batch,
        "max_step_tokens": max_step_tokens,
        "block_tokens": block_tokens,
    }
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} is out of range", found=value, expected="1 or more")
    if speculate < 0:
        raise UsageError("speculate is out of range", found=speculate, expected="0 or more")
    if speculate and not config.num_nextn_predict_layers:
        raise UsageError(
            "the model has no MTP module to speculate with",
            found=f"speculate {speculate}",
            fix="leave out speculation, or use a checkpoint with num_nextn_predict_layers",
        )
    if speculate and block_tokens < config.num_nextn_predict_layers:
        raise UsageError(
            "blocks are too small to speculate with",
            found=f"{block_tokens} tokens",
            expected=f"at least the {config.num_nextn_predict_layers} MTP modules",
        )


def _max_positions(model: DeepseekV3, max_model_len: int | None) -> int:
    limit = model.config.max_position_embeddings
    if max_model_len is None:
        return limit
    if not 2 <= max_model_len <= limit:
        raise UsageError(
            "max_model_len is out of range",
            found=max_model_len,
            expected=f"2 to the model's context of {limit}",
        )
    return max_model_len
