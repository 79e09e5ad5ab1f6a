"""Training a byte-level BPE with V3's pre-tokenizer and special tokens, of any size (report §4.1).

Ids as in V3: begin, end, pad; the 256 bytes; the merges in the order learnt; then `<think>`, the
FIM and turn tokens and the tool markers. The same texts in the same order give the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.tokenizer.definition import bpe_definition, build, byte_alphabet
from rorqual.tokenizer.special import FIRST_SPECIALS, LAST_SPECIALS
from rorqual.tokenizer.splits import SPLITS, V3, pre_tokenizer
from rorqual.tokenizer.tokenizer import Tokenizer

NUM_SPECIALS = len(FIRST_SPECIALS) + len(LAST_SPECIALS)
MIN_VOCAB_SIZE = 256 + NUM_SPECIALS
MIN_FREQUENCY = 2
"""A pair seen once is chance, not language: it is not merged."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, merge_digits: bool = True) -> Tokenizer:
    """Learns `vocab_size` tokens, special ones included, from `texts`.

    With `merge_digits=False` no token holds more than one digit, as small models calculate better
    so; the pre-tokenizer stays V3's either way. Texts with too few repeated pairs give fewer tokens
    than asked for: read `vocab_size` from the result. TokenizerError if there is no text.
    """
    import tokenizers
    from tokenizers import models, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(
            "the vocabulary is too small",
            found=vocab_size,
            expected=f"at least {MIN_VOCAB_SIZE} (256 bytes and {NUM_SPECIALS} special tokens)",
        )
    learner = tokenizers.Tokenizer(models.BPE())
    # Digits never merge if they are learnt one by one: V3's splits then find no merge to apply.
    # Letters and spaces are always split from numbers, so no ' 1' can arise either.
    numbers, *others = SPLITS[V3]
    if not merge_digits:
        numbers = r"\p{N}"
    learner = tokenizers.Tokenizer.from_str(
        json.dumps(
            {**json.loads(learner.to_str()), "pre_tokenizer": pre_tokenizer(numbers, *others)}
        )
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_SPECIALS),
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(FIRST_SPECIALS),
        initial_alphabet=list(byte_alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    learner.train_from_iterator(counted, trainer)
    if counted.num_texts == 0:
        raise TokenizerError("there is no text to learn from", expected="at least one text")
    return build(_definition(json.loads(learner.to_str())["model"]))


class _Counted:
    """Hands on texts, counts them, and stops at the first that is no text."""

    def __init__(self, texts: Iterable[str]) -> None:
        if isinstance(texts, str):
            raise TokenizerError("one string was given, not texts", fix="pass a list: [text]")
        self._texts = iter(texts)
        self.num_texts = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        if not isinstance(text, str):
            raise TokenizerError(
                "is not text", where=f"texts[{self.num_texts}]", found=type(text).__name__
            )
        self.num_texts += 1
        return text


def _definition(model: dict[str, Any]) -> dict[str, Any]:
    """A whole `tokenizer.json` around a learnt model, with the last special tokens added."""
    num_base = len(model["vocab"])
    ids = {token: token_id for token_id, token in enumerate(FIRST_SPECIALS)}
    ids |= {token: num_base + offset for offset, token in enumerate(LAST_SPECIALS)}
    return {**bpe_definition({}, [], ids, V3), "model": model}
