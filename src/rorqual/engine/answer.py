"""The answer that grows from a request.

The text that a user sees trails the tokens: half a character waits for its other half, and what may
become a stop string waits until it is one or is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.logprobs import TokenLogprob
from rorqual.engine.request import FinishReason, Output, Piece, Request, Usage
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import Verified
from rorqual.tokenizer import Tokenizer


class StopFilter:
    """Passes text on, but holds back what a stop string may yet begin with; `keeps_stop` passes
    that on too.
    """

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        self._stops, self._keeps_stop = stops, keeps_stop
        self._held = ""
        self.stop: str | None = None
        """The one that has come."""

    @property
    def is_stopped(self) -> bool:
        return self.stop is not None

    def put(self, text: str) -> str:
        """The text that is now certain to belong to the answer."""
        if not self._stops:
            return text
        self._held += text
        found = {stop: at for stop in self._stops if (at := self._held.find(stop)) >= 0}
        if found:
            self.stop = min(found, key=lambda stop: found[stop])
            num_kept = len(self.stop) if self._keeps_stop else 0
            passed, self._held = self._held[: found[self.stop] + num_kept], ""
            return passed
        num_held = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - num_held
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """What was held back, when the answer ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """How many of the last characters are a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Answer:
    """A running request: what is sampled so far, its text, and why it ended.

    UsageError for parameters that this tokenizer cannot take. `state` is sampling's memory.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        max_positions: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self._first_version = self._last_version = 0
        self._max_tokens = min(params.max_tokens, max_positions - len(request.prompt_ids))
        self.state = SamplingState(
            params,
            request.prompt_ids,
            tokenizer,
            grammars,
            request.compiled,
            max_tokens=self._max_tokens,
        )
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self.logprobs: list[TokenLogprob] = []
        # The first token of a prompt follows nothing, so nothing says how likely it was.
        is_asked = params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if is_asked else None
        self._drafted: list[int] = []
        self._accepted: list[int] = []
        self._decoder = tokenizer.stream()
        self._hidden_ids = tokenizer.hidden_ids
        keeps_stop = params.include_stop_str_in_output
        self._filter = StopFilter(params.stop, keeps_stop=keeps_stop)

    @property
    def num_left(self) -> int:
        """How many tokens the answer may still take."""
        return self._max_tokens - len(self.token_ids)

    @property
    def needs_prompt_logprobs(self) -> bool:
        known = self.prompt_logprobs
        return known is not None and len(known) < len(self.request.prompt_ids)

    @property
    def num_prompt_logprobs(self) -> int:
        return 0 if self.prompt_logprobs is None else len(self.prompt_logprobs)

    def add_prompt_logprobs(self, more: Sequence[TokenLogprob]) -> None:
        """Takes those of the next of the prompt's tokens, if they were asked for."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += more

    @property
    def usage(self) -> Usage:
        return Usage(
            len(self.request.prompt_ids),
            self.num_cached_tokens,
            len(self.token_ids),
            tuple(self._drafted),
            tuple(self._accepted),
        )

    def commit(self, verified: Verified, num_drafted: int, weights_version: int = 0) -> Piece:
        """Takes what one step gave; a stop string may end the answer before the last of it."""
        if not self.token_ids:
            self._first_version = weights_version
        self._last_version = weights_version
        self._count_drafts(num_drafted, verified.num_accepted)
        self.state.commit(verified.token_ids, verified.guide)
        is_first = not self.token_ids
        text, num_put = "", 0
        for token_id in verified.token_ids:
            text += self.put(token_id)
            num_put += 1
            if self.finish_reason is not None:
                break
        logprobs = verified.logprobs[:num_put]
        self.logprobs += logprobs
        return Piece(
            text,
            verified.token_ids[:num_put],
            logprobs,
            self.finish_reason,
            self.usage if self.finish_reason is not None else None,
            self._whole_prompt_logprobs() if is_first else None,
            self._filter.stop,
            weights_version,
        )

    def put(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now. May end the answer."""
        assert self.finish_reason is None, "the answer has ended"
        self.token_ids.append(token_id)
        text = ""
        if token_id in self.state.end_ids:
            if self.request.params.include_stop_str_in_output:
                text = self._text_of(token_id)
            self.finish_reason = "length" if self.state.is_cut_short else "stop"
        else:
            text = self._text_of(token_id)
            if self._filter.is_stopped:
                self.finish_reason = "stop"
            elif self.num_left <= 0:
                self.finish_reason = "length"
        if self.finish_reason is not None and not self._filter.is_stopped:
            text += self._flush()
        self.text += text
        return text

    def output(self) -> Output:
        assert self.finish_reason is not None, "the answer has not ended"
        return Output(
            self.text,
            self.token_ids,
            self.finish_reason,
            self.usage,
            tuple(self.logprobs),
            self._whole_prompt_logprobs(),
            (self._first_version, self._last_version),
        )

    def _text_of(self, token_id: int) -> str:
        """What a token adds to the text that is certain."""
        is_skipped = self.request.params.skip_special_tokens and token_id in self._hidden_ids
        text = "" if is_skipped else self._decoder.put(token_id)
        is_early = len(self.token_ids) <= self.request.params.min_tokens
        return text if is_early else self._filter.put(text)

    def _count_drafts(self, num_drafted: int, num_accepted: int) -> None:
        num_new = num_drafted - len(self._drafted)
        self._drafted += [0] * num_new
        self._accepted += [0] * num_new
        for position in range(num_drafted):
            self._drafted[position] += 1
            self._accepted[position] += position < num_accepted

    def _whole_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        return None if self.prompt_logprobs is None else tuple(self.prompt_logprobs)

    def _flush(self) -> str:
        """The rest of a character and of a stop string that never became whole."""
        text = self._filter.put(self._decoder.finish())
        if self._filter.is_stopped:
            self.finish_reason = "stop"
            return text
        return text + self._filter.finish()
