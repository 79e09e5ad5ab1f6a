"""A sequence: an answer's text on its way through the model, and where its latents lie."""

from __future__ import annotations

from typing import NamedTuple

from rorqual.engine.answer import Answer
from rorqual.engine.blocks import block_key
from rorqual.engine.mtp_state import DepthState


class Turn(NamedTuple):
    """Who shares places with others: an owner, and whether it is in the background."""

    is_background: bool
    owner: str


class TokenSequence:
    """Prompt and answer as one text. The first `num_computed` tokens have their latents in the
    cache, in the slots of `blocks`; the last token never has, for it is what runs next.
    """

    def __init__(self, answer: Answer, arrival: int, block_tokens: int) -> None:
        self.answer, self.arrival = answer, arrival
        self.is_background = answer.request.is_background
        self.turn = Turn(self.is_background, answer.request.owner)
        self.token_ids = list(answer.request.prompt_ids)
        self.num_overtaken = 0  # by how many that came later
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_published = 0  # of its blocks
        self.depths: tuple[DepthState, ...] | None = None  # of speculation
        self.num_followed = 0  # of its blocks, by these
        self._block_tokens = block_tokens
        self._keys: list[bytes] = []

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is still to run."""
        return self.num_computed == len(self.token_ids) - 1

    def key(self, number: int) -> bytes:
        """The name of the content of its full block `number`."""
        size = self._block_tokens
        while len(self._keys) <= number:
            start = len(self._keys) * size
            parent = self._keys[-1] if self._keys else b""
            self._keys.append(block_key(parent, self.token_ids[start : start + size]))
        return self._keys[number]

    def forget(self) -> list[int]:
        """Gives its blocks up: everything is to be computed again. Its answer goes on later."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = self.num_published = self.num_followed = 0
        self.depths = None
        return blocks
