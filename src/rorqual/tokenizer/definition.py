"""From a parsed `tokenizer.json` to a Tokenizer: the checks that it is a byte-level BPE and whole.

Format: Hugging Face `tokenizers`, whose byte-level models write each byte as one visible character.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rorqual.errors import TokenizerError, listing
from rorqual.tokenizer import special as names
from rorqual.tokenizer.splits import WHOLE_PIECES_FIRST, pre_tokenizer_of
from rorqual.tokenizer.templates import v3_template
from rorqual.tokenizer.tokenizer import Tokenizer

NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
"""Bytes that no text holds; DeepSeek-Coder's vocabulary leaves them out."""


def build(
    definition: dict[str, Any],
    *,
    where: object = None,
    bos_token: str = names.BOS,
    eos_token: str = names.EOS,
    pad_token: str | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """The Tokenizer of a parsed `tokenizer.json`; TokenizerError if it is no byte-level BPE.

    `where` names the file in errors. Without `pad_token`, V3's if there is one, else
    `eos_token`; without `chat_template`, V3's.
    """
    import tokenizers

    special_ids = _special_ids(definition, where)
    vocabulary = _vocabulary(definition, where)
    plain = {**definition, "added_tokens": [], "post_processor": None}
    plain |= {"truncation": None, "padding": None}
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
    except Exception as problem:  # noqa: BLE001  tokenizers raises bare Exception
        raise _unreadable(problem, where) from None
    token_bytes = _token_bytes(vocabulary, special_ids, where)
    if pad_token is None:
        pad_token = names.PAD if names.PAD in special_ids else eos_token
    for key, token in (("bos", bos_token), ("eos", eos_token), ("pad", pad_token)):
        if token not in special_ids:
            raise TokenizerError(
                f"has no special token for {key}_token",
                where=where,
                found=repr(token),
                expected="a token among its added_tokens",
                fix="take tokenizer.json and tokenizer_config.json from the same model",
            )
    return Tokenizer(
        plain=inner,
        token_bytes=token_bytes,
        special_ids=special_ids,
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
        chat_template=chat_template or v3_template(),
        definition=json.dumps(definition, ensure_ascii=False),
    )


def bpe_definition(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    specials: Mapping[str, int],
    pre: str,
) -> dict[str, Any]:
    """A whole `tokenizer.json` of a byte-level BPE whose texts are split as `splits` names it."""
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": token not in names.FIRST_SPECIALS,
            "special": token in names.HIDDEN_SPECIALS,
        }
        for token, token_id in specials.items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": pre_tokenizer_of(pre),
        "post_processor": names.byte_level(trim_offsets=False),
        "decoder": names.byte_level(trim_offsets=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_PIECES_FIRST,
            "vocab": dict(vocabulary),
            "merges": [list(pair) for pair in merges],
        },
    }


def _unreadable(problem: object, where: object) -> TokenizerError:
    return TokenizerError(
        f"is not a tokenizer: {problem}",
        where=where,
        fix="restore the file from its source",
    )


def _special_ids(definition: dict[str, Any], where: object) -> dict[str, int]:
    if "added_tokens" not in definition:
        raise TokenizerError(
            "is not a tokenizer: it has no added_tokens",
            where=where,
            found=f"keys {listing(list(definition))}" if definition else "{}",
            expected='"added_tokens" and "model", as the library tokenizers writes them',
            fix="restore the file from its source",
        )
    try:
        return {token["content"]: int(token["id"]) for token in definition["added_tokens"]}
    except (KeyError, TypeError, ValueError) as problem:
        raise _unreadable(f"added_tokens: {problem!r}", where) from None


def _vocabulary(definition: dict[str, Any], where: object) -> dict[str, int]:
    """The token -> id table of a byte-level BPE that knows every byte of UTF-8."""
    model = definition.get("model")
    kind = model.get("type") if isinstance(model, dict) else "no model"
    if kind != "BPE" or "ByteLevel" not in json.dumps(definition.get("decoder")):
        raise TokenizerError(
            "is not a byte-level BPE",
            where=where,
            found=kind,
            expected='model.type "BPE" with a ByteLevel decoder, as DeepSeek has',
            fix="use the tokenizer of a model of DeepSeek's family; other kinds are not supported",
        )
    vocabulary = definition["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise _unreadable("model.vocab is not a table", where)
    missing = [
        char
        for char, byte in byte_alphabet().items()
        if char not in vocabulary and byte not in NEVER_IN_UTF8
    ]
    if missing:
        raise TokenizerError(
            f"lacks {len(missing)} of the byte tokens that text is made of",
            where=where,
            found="".join(missing[:20]),
            fix="use the tokenizer that the model was published with: this one cannot write "
            "every text",
        )
    return vocabulary


def _token_bytes(
    vocabulary: dict[str, int], special_ids: dict[str, int], where: object
) -> tuple[bytes, ...]:
    """The bytes of every id from 0 on; TokenizerError for a gap or a clash of ids."""
    byte_of = byte_alphabet()
    token_of: dict[int, str] = {}
    for token, token_id in [*vocabulary.items(), *special_ids.items()]:
        is_taken = token_of.setdefault(token_id, token) != token
        if is_taken or vocabulary.get(token, token_id) != token_id:
            raise TokenizerError(
                "a token and its id do not belong together",
                where=where,
                found=f"{token!r} with id {token_id}, which clashes with the vocabulary",
                fix="restore the file from its source",
            )
    num_ids = len(token_of)
    gap = next((token_id for token_id in range(num_ids) if token_id not in token_of), None)
    if gap is not None:
        raise TokenizerError(
            "its ids have gaps",
            where=where,
            found=f"{num_ids} tokens up to id {max(token_of)}, but none with id {gap}",
            expected="ids from 0 without a gap",
            fix="take tokenizer.json from the model's source: tokens were removed from this one",
        )

    def to_bytes(token: str) -> bytes:
        if token in special_ids or any(char not in byte_of for char in token):
            return token.encode("utf-8")
        return bytes([byte_of[char] for char in token])

    return tuple(to_bytes(token_of[token_id]) for token_id in range(num_ids))


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The 256 characters by which byte-level BPE (GPT-2's) writes bytes, with their bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}
