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
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.answer import Answer
from rorqual.engine.blocks import BlockPool
from rorqual.engine.draft_policy import Outcome, PayingDrafts
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.invariant import InvariantRunner
from rorqual.engine.logprobs import TokenLogprob, token_logprobs
from rorqual.engine.memory import MIN_BLOCKS, budget_bytes, num_blocks
from rorqual.engine.new_weights import replace_weights
from rorqual.engine.offline import Stream, answer_in_order, seeded
from rorqual.engine.options import EngineOptions
from rorqual.engine.paged_cache import PagedLatentCache, block_bytes
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Output, Piece, Request, check_prompt, listed
from rorqual.engine.runner import Runner
from rorqual.engine.scheduler import Limits, Scheduler
from rorqual.engine.segment import Segment
from rorqual.engine.sequence import TokenSequence
from rorqual.engine.speculative import Speculator
from rorqual.engine.stats import EngineStats
from rorqual.engine.verify import Scores, verify
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.model.served import use_kernels
from rorqual.ops.device import resolve_device
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder

# Choice: expanded keys are made anew in each step, and nobody else waits for a lone prompt.
LONE_FACTOR = 4
LOGPROB_ROWS = 64  # rows of logits that exist at once for a prompt's log-probabilities


class Engine:
    """Answers requests with one model: that of a folder, or one given with its tokenizer.

    Options come as one `EngineOptions`, or by their names: `Engine("DIR", speculate=2)`.

    What a seed promises: with `is_batch_invariant` the same text with and without drafts, alone and
    in any company, to the last bit in every dtype, on one machine with one and the same number of
    threads; slower. Without it, up to rounding: more rows in a step sum in another order, which
    matters where two tokens are that close, hardly ever in float32 and now and then in bfloat16.
    """

    def __init__(
        self,
        model: str | Path | DeepseekV3,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        **changes: Any,
    ) -> None:
        self.options = options = replace(options or EngineOptions(), **changes)
        model, tokenizer = _loaded(model, tokenizer, options)
        options.check(model.config, tokenizer)
        self.model, self.tokenizer, self.max_batch = model, tokenizer, options.max_batch
        max_positions = options.max_positions(model.config.max_position_embeddings)
        self._cache, blocks = _make_cache(model, options, max_positions)
        use_kernels(model, options.kernels)  # last of what may be refused: they stay with the model
        self.max_positions = min(max_positions, blocks * options.block_tokens)
        self._pool = BlockPool(blocks)
        self._scheduler = Scheduler(
            self._pool,
            Limits(
                options.block_tokens,
                options.max_batch,
                options.max_step_tokens,
                options.use_prefix_cache,
                options.max_step_tokens * (LONE_FACTOR if model.fused else 1),
            ),
        )
        # The last block of the cache is not in the pool: it is there for dummy tokens.
        num_ids = tokenizer.vocab_size
        self._runner = (
            InvariantRunner(model, self._cache, blocks, num_ids)
            if options.is_batch_invariant
            else Runner(model, self._cache, num_ids)
        )
        self._speculator = Speculator(self._runner, self._cache)
        self._draft_policy = options.draft_policy or PayingDrafts(options.speculate)
        self.grammars = GrammarCompiler(tokenizer)
        self._sequences: dict[Answer, TokenSequence] = {}
        self.weights_version = 0
        self._arrivals = count()
        self._num_prompt_tokens = self._num_output_tokens = 0
        self._drafted, self._accepted = [0] * options.speculate, [0] * options.speculate

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
        sequence = TokenSequence(answer, next(self._arrivals), self.options.block_tokens)
        self._sequences[answer] = sequence
        self._scheduler.add(sequence)
        self._num_prompt_tokens += len(request.prompt_ids)
        return answer

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

    @torch.inference_mode()
    def step(self) -> list[tuple[Answer, Piece]]:
        """Runs the model once; what each answer gained.

        Up to the last line no answer changes: a step that fails before can be done again.
        """
        segments = self._scheduler.schedule(self._num_drafts())
        segments = self._speculator.draft(segments)
        segments, scores = self._run(segments)
        segments = self._verify(segments, scores)
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
        """The answer's text as it comes; UsageError, at once, if there can be no answer."""
        self.check_prompt(prompt_ids)
        return Stream(self, Request(prompt_ids, params))

    def _num_drafts(self) -> int:
        wanted = self._draft_policy.begin(self._scheduler.num_decoding)
        return min(wanted, len(self._drafted))

    def _run(self, segments: list[Segment]) -> tuple[list[Segment], Scores]:
        """The segments with their hidden states, and the scores behind those that are last."""
        if not segments:
            return [], Scores()
        states = [segment.sequence.answer.state for segment in segments if segment.is_last]
        ran = self._runner.step(
            [segment.span for segment in segments],
            [1 + len(s.drafts) if s.is_last else 0 for s in segments],
            needs_logits=not all(state.is_plain for state in states),
        )
        segments = [
            s._replace(hidden_TD=h_TD) for s, h_TD in zip(segments, ran.hidden, strict=True)
        ]
        return segments, ran.scores

    def _verify(self, segments: list[Segment], scores: Scores) -> list[Segment]:
        """The segments with new tokens, where they reach the end of their text, and with the
        log-probabilities of the prompt's tokens.
        """
        ready = [segment for segment in segments if segment.is_last]
        results = verify(
            scores,
            [segment.drafts for segment in ready],
            [segment.sequence.answer.state for segment in ready],
            is_row_by_row=self._runner.is_row_by_row,
        )
        verified = iter(results)
        return [
            self._with_prompt_logprobs(s)._replace(verified=next(verified) if s.is_last else None)
            for s in segments
        ]

    def _commit(self, segments: list[Segment]) -> list[tuple[Answer, Piece]]:
        """Hands the results to the sequences and answers; what each answer gained."""
        pieces = []
        for segment in segments:
            sequence, num_kept = segment.sequence, segment.num_tokens
            answer = sequence.answer
            answer.add_prompt_logprobs(segment.prompt_logprobs)
            if segment.verified is not None:
                piece = answer.commit(segment.verified, len(segment.drafts), self.weights_version)
                pieces.append((answer, piece))
                sequence.token_ids += piece.token_ids
                num_kept += len(piece.token_ids) - 1
                self._count(piece, len(segment.drafts), segment.verified.num_accepted)
            self._speculator.note(segment, num_kept)
            sequence.num_computed = segment.start + num_kept
        is_drafting = self._draft_policy.num_drafts > 0
        self._speculator.follow(segments, is_drafting=is_drafting)
        for sequence in [segment.sequence for segment in segments]:
            self._scheduler.publish(sequence)
            if sequence.answer.finish_reason is not None:
                self.cancel(sequence.answer)
        self._draft_policy.end(
            [Outcome(s.num_drafts, s.num_accepted) for s in segments if s.is_decode],
            is_decode=all(segment.is_decode for segment in segments),
        )
        return pieces

    def _with_prompt_logprobs(self, segment: Segment) -> Segment:
        """The segment with the log-probability of each prompt token that follows one of its tokens,
        if the request asked for them.
        """
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
        return segment._replace(prompt_logprobs=found)

    def _count(self, piece: Piece, num_drafted: int, num_accepted: int) -> None:
        self._num_output_tokens += len(piece.token_ids)
        for position in range(num_drafted):
            self._drafted[position] += 1
            self._accepted[position] += position < num_accepted


def _loaded(
    model: str | Path | DeepseekV3, tokenizer: Tokenizer | None, options: EngineOptions
) -> tuple[DeepseekV3, Tokenizer]:
    """The folder's model and tokenizer, or those that were given.

    Options that the folder's configuration rules out are refused before its weights are read.
    """
    device = options.device
    if not isinstance(model, DeepseekV3):
        folder = ModelFolder.find(str(model))
        tokenizer = tokenizer or folder.load_tokenizer()
        options.check(folder.model_config(), tokenizer)
        model = folder.load_model(options.dtype, device, options.kernels)
    elif device != "auto" and resolve_device(device) != model.device:
        raise UsageError(
            "the model is on another device",
            found=model.device,
            expected=device,
            fix="move it there first: model.to(device)",
        )
    if tokenizer is None:
        raise UsageError("a model without a folder needs a tokenizer", fix="give it both")
    return model, tokenizer


def _make_cache(
    model: DeepseekV3, options: EngineOptions, max_positions: int
) -> tuple[PagedLatentCache, int]:
    """A cache with a block more than the number that sequences may have, and this number."""
    config, size, kind = model.config, options.block_tokens, options.kv_cache_dtype
    if kind == "auto" and model.is_stored:
        kind = "bf16"
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    num_depths = min(options.speculate, config.num_nextn_predict_layers)
    num_bytes = block_bytes(config, size, kind, like.dtype, num_depths)
    wanted = max(options.max_batch * -(-max_positions // size), MIN_BLOCKS) * num_bytes
    blocks = num_blocks(budget_bytes(options.cache_memory, wanted, like.device), num_bytes)
    shape = (blocks + 1, size)
    return PagedLatentCache(config, shape, kind, like, num_depths), blocks
