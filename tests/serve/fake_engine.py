"""An engine without a model: answers that the prompt chooses, delays that a test chooses.

It keeps AsyncEngine's contract, so that the server's tests are exact and quick. The answer to a
prompt is the value of the first key of `script` that its text contains, with special tokens by
name, else `DEFAULT`. A token's "log-probability" is a function of its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import cast

from rorqual.engine import (
    AnswerClosed,
    CompiledGrammar,
    EngineFailed,
    EngineOverloaded,
    EngineStats,
    Grammar,
    Piece,
    Request,
    TokenLogprob,
    Usage,
)
from rorqual.tokenizer import Tokenizer

DEFAULT = "The whale swims in the sea."
BLOCK_TOKENS = 4
NUM_BLOCKS = 100


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    """What the fake says of any token."""
    own = -(token_id % 7 + 1) / 10
    return TokenLogprob(token_id, own, tuple((token_id + k, own - k) for k in range(num_top)))


class FakeEngine:
    """`AsyncEngine`'s face. `gate` holds all answers back while it is clear; after `hold_after`
    pieces, counted over all answers, the engine clears it itself.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Mapping[str, str] | None = None,
        *,
        max_open: int = 1000,
        step_seconds: float = 0.0,
        step_tokens: int = 1,
        num_drafts: int = 0,
        hold_after: int | None = None,
    ) -> None:
        self.tokenizer, self.script = tokenizer, dict(script or {})
        self.max_open, self.step_seconds, self.step_tokens = max_open, step_seconds, step_tokens
        self.num_drafts, self.hold_after = num_drafts, hold_after
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[Request] = []
        self.num_open = self.num_cancelled = self.num_done = self.num_output_tokens = 0
        self.num_pieces = 0
        self.is_started = self.is_closed = self.is_draining = False
        self.problem: Exception | None = None
        self.failure: EngineFailed | None = None
        self._known_prefixes: set[tuple[int, ...]] = set()

    @property
    def is_held(self) -> bool:
        return not self.gate.is_set()

    async def start(self) -> None:
        self.is_started = True

    async def close(self) -> None:
        self.is_closed = True
        self.gate.set()

    async def drain(self, timeout_seconds: float) -> bool:
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.num_open:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return False
        return True

    def submit(self, request: Request) -> AsyncIterator[Piece]:
        if self.num_open >= self.max_open or self.is_draining:
            raise EngineOverloaded("too many answers are open", found=self.num_open)
        self.num_open += 1
        self.requests.append(request)
        return self._answer(request)

    def most_at_once(self, request: Request) -> int:
        return self.max_open

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Whether it is well formed is the real engine's affair."""
        return cast(CompiledGrammar, grammar)

    def known_grammar(self, grammar: Grammar) -> CompiledGrammar | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=0,
            num_running=self.num_open,
            num_blocks=NUM_BLOCKS,
            num_free_blocks=NUM_BLOCKS - min(self.num_open, NUM_BLOCKS),
            num_prefix_queried_tokens=sum(len(request.prompt_ids) for request in self.requests),
            num_prefix_hit_tokens=0,
            num_prompt_tokens=sum(len(request.prompt_ids) for request in self.requests),
            num_output_tokens=self.num_output_tokens,
            num_preemptions=0,
            drafted=(10,) * self.num_drafts,
            accepted=(8,) * self.num_drafts,
            num_drafts=self.num_drafts,
        )

    async def _answer(self, request: Request) -> AsyncIterator[Piece]:
        is_done = False
        try:
            async for piece in self._pieces(request):
                is_done = piece.finish_reason is not None
                yield piece
        finally:
            self.num_open -= 1
            self.num_done += is_done
            self.num_cancelled += not is_done

    async def _pieces(self, request: Request) -> AsyncIterator[Piece]:
        params = request.params
        num_cached = self._look_up(tuple(request.prompt_ids))
        ids, text, reason, stop = self._plan(request)
        decoder = self.tokenizer.stream()
        num_sent = 0
        starts = range(0, len(ids), self.step_tokens)
        for start in starts:
            if self.num_pieces == self.hold_after:
                self.hold_after = None  # once: what is let go on, goes on
                self.gate.clear()
            await self.gate.wait()
            self.num_pieces += 1
            await asyncio.sleep(self.step_seconds)
            if self.is_closed:
                raise AnswerClosed("the engine was closed before the answer was complete")
            if self.problem is not None:
                raise self.problem
            chunk = ids[start : start + self.step_tokens]
            self.num_output_tokens += len(chunk)
            shown = "".join(decoder.put(i) for i in chunk if i != self.tokenizer.eos_id)
            shown = shown[: max(len(text) - num_sent, 0)]
            num_sent += len(shown)
            is_last = start == starts[-1]
            num_top = params.logprobs
            prompt = params.prompt_logprobs
            yield Piece(
                text=shown,
                token_ids=tuple(chunk),
                logprobs=() if num_top is None else tuple(logprob_of(i, num_top) for i in chunk),
                finish_reason=reason if is_last else None,
                usage=self._usage(request, num_cached, len(ids)) if is_last else None,
                stop=stop if is_last else None,
                prompt_logprobs=None
                if prompt is None or start
                else (None, *(logprob_of(i, prompt) for i in request.prompt_ids[1:])),
            )

    def _plan(self, request: Request) -> tuple[list[int], str, str, str | None]:
        """All ids of the answer, its text, why it ends, and the stop string that ended it."""
        prompt = self.tokenizer.decode(request.prompt_ids)
        text = next((answer for key, answer in self.script.items() if key in prompt), DEFAULT)
        ids = [*self.tokenizer.encode(text, allow_special=True), self.tokenizer.eos_id]
        reason, end = "stop", None
        found = [(at, stop) for stop in request.params.stop if (at := text.find(stop)) >= 0]
        if found:
            at, end = min(found)
            text = text[:at]
            ids = self.tokenizer.encode(text, allow_special=True) or [self.tokenizer.eos_id]
        stops = [at for at, i in enumerate(ids) if i in request.params.stop_token_ids]
        if stops:  # the token that stops is no text, as the engine has it
            text = self.tokenizer.decode(ids[: stops[0]])
            ids = ids[: stops[0] + 1]
        if len(ids) > request.params.max_tokens:
            ids, reason, end = ids[: request.params.max_tokens], "length", None
        return ids, text, reason, end

    def _usage(self, request: Request, num_cached: int, num_output: int) -> Usage:
        num_prompt = len(request.prompt_ids)
        drafted = tuple(10 for _ in range(self.num_drafts))
        accepted = tuple(8 - 2 * k for k in range(self.num_drafts))
        return Usage(num_prompt, num_cached, num_output, drafted, accepted)

    def _look_up(self, ids: tuple[int, ...]) -> int:
        """Tokens of whole blocks that an earlier prompt had; remembers this one's."""
        ends = range(BLOCK_TOKENS, len(ids), BLOCK_TOKENS)
        num_cached = max((end for end in ends if ids[:end] in self._known_prefixes), default=0)
        self._known_prefixes |= {ids[:end] for end in ends}
        return num_cached
