"""A conversation: the turns so far, kept within the model's context."""

from __future__ import annotations

from collections import abc

from rorqual.engine.engine import Engine
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Usage
from rorqual.errors import UsageError

Turn = tuple[str, str]  # what the user said, what was answered


def prompt_room(max_positions: int, max_tokens: int) -> int:
    """Tokens that a prompt may take before old turns are dropped.

    Choice: an answer is given half of the context, or as much as it may ever take.
    """
    return max_positions - min(max_tokens, max_positions // 2)


class Conversation:
    """`ask` streams the answer to one message and remembers both.

    When the turns no longer fit, the oldest are dropped, never the system text;
    `num_dropped_turns` counts those that the last `ask` dropped, for the user to be told. With
    `is_raw` each message is a plain text to be continued, and nothing is remembered; with
    `reads_special` names of special tokens in it are these tokens. `params` and `system` may be
    changed between two answers; `usage` is the last answer's.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None = None,
        *,
        is_raw: bool = False,
        reads_special: bool = False,
    ) -> None:
        if is_raw and system is not None:
            raise UsageError("a raw prompt has no system text", fix="leave out --system or --raw")
        self._engine, self.params, self.system = engine, params, system
        self._is_raw, self._reads_special = is_raw, reads_special
        self.turns: list[Turn] = []
        self.num_dropped_turns = 0
        self.usage: Usage | None = None

    @property
    def num_ids(self) -> int:
        """Tokens that the model knows."""
        return self._engine.tokenizer.vocab_size

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system text and the turns, as the API has them."""
        return self._messages(self.turns)

    def clear(self) -> None:
        """Forgets all turns."""
        self.turns = []

    def undo(self) -> str | None:
        """Forgets the last turn; what the user said in it, None if there is no turn."""
        return self.turns.pop()[0] if self.turns else None

    def ask(self, text: str) -> abc.Generator[str, None, None]:
        """The answer's text as it comes; empty pieces mark tokens that show nothing yet.

        UsageError, at once, if the message alone does not fit the context. An answer that is closed
        before its end is remembered as far as it came.
        """
        prompt_ids, num_dropped = self._fit(text)
        self.num_dropped_turns = num_dropped
        del self.turns[:num_dropped]
        return self._answer(text, prompt_ids)

    def ask_again(self) -> abc.Generator[str, None, None] | None:
        """Another answer to the last message in place of its own; None if there is no message.

        UsageError as `ask` has it, and then nothing is forgotten.
        """
        if not self.turns:
            return None
        last = self.turns.pop()
        try:
            return self.ask(last[0])
        except UsageError:
            self.turns.append(last)
            raise

    def _answer(self, text: str, prompt_ids: list[int]) -> abc.Generator[str, None, None]:
        stream = self._engine.stream(prompt_ids, self.params)
        try:
            yield from stream
        finally:
            self.usage = stream.usage
            if not self._is_raw:
                self.turns.append((text, stream.text))

    def _fit(self, text: str) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the oldest turns had to be left out."""
        room = prompt_room(self._engine.max_positions, self.params.max_tokens)
        num_dropped = 0
        prompt_ids = self._prompt_ids(self.turns, text)
        while len(prompt_ids) > room and num_dropped < len(self.turns):
            num_dropped += 1
            prompt_ids = self._prompt_ids(self.turns[num_dropped:], text)
        self._engine.check_prompt(prompt_ids)
        return prompt_ids, num_dropped

    def _prompt_ids(self, turns: list[Turn], text: str) -> list[int]:
        tokenizer = self._engine.tokenizer
        if self._is_raw:
            return tokenizer.encode_raw(text, reads_special=self._reads_special)
        return tokenizer.encode_chat([*self._messages(turns), {"role": "user", "content": text}])

    def _messages(self, turns: list[Turn]) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages
