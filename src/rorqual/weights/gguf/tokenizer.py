"""A tokenizer as GGUF keys `tokenizer.*`, and back.

Source: docs/gguf.md and llama.cpp's conversion/base.py. Tokens are listed by id with their kind;
ids that the model has rows for but the tokenizer no token are `[PADn]`, unused. The pre-tokenizer
is one of the names in `tokenizer.splits`, which readers know; any other is kept as
`tokenizer.huggingface.json`, which llama.cpp does not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.errors import TokenizerError
from rorqual.files import NOT_JSON
from rorqual.log import logger
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.definition import bpe_definition, build
from rorqual.tokenizer.splits import SPLITS, WHOLE_PIECES_FIRST, pre_tokenizer_of
from rorqual.tokenizer.templates import mended
from rorqual.tokenizer.tiktoken import merges_of
from rorqual.weights.gguf.format import Value, single

MODEL = "tokenizer.ggml.model"
NO_TOKENIZER = "none"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
KINDS = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
SPECIAL_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
TEMPLATE = "tokenizer.chat_template"
WHOLE = "tokenizer.huggingface.json"

UNKNOWN_PRE = "default"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Value]:
    """The keys for a model of `vocab_size` rows, at least the tokenizer's ids."""
    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    names = {token_id: token for token, token_id in model["vocab"].items()}
    added = {token["id"]: token for token in definition["added_tokens"]}
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        if token_id in added:
            tokens.append(added[token_id]["content"])
            kinds.append(CONTROL if _is_control(added[token_id]) else USER_DEFINED)
        else:
            tokens.append(names.get(token_id, f"[PAD{token_id}]"))
            kinds.append(NORMAL if token_id in names else UNUSED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    keys: dict[str, Value] = {
        MODEL: "gpt2",
        PRE: UNKNOWN_PRE,
        TOKENS: tokens,
        KINDS: np.array(kinds, dtype=np.int32),
        MERGES: merges,
        SPECIAL_IDS["bos"]: tokenizer.bos_id,
        SPECIAL_IDS["eos"]: tokenizer.eos_id,
        SPECIAL_IDS["pad"]: tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        TEMPLATE: tokenizer.chat_template,
    }
    keys[PRE] = _name_of_splits(definition)
    if keys[PRE] == UNKNOWN_PRE:
        keys[WHOLE] = tokenizer.definition
        logger(__name__).warning(
            "the tokenizer splits text in another way than DeepSeek-V3: llama.cpp would give other "
            "ids; Rorqual reads the file as it is"
        )
    return keys


def _is_control(token: Mapping[str, Any]) -> bool:
    """llama.cpp hides these in its output, as V3's readers do with `<｜...｜>`."""
    name = token["content"]
    is_marked = name.startswith(("<|", "<｜")) and name.endswith(("|>", "｜>"))
    return bool(token.get("special")) or is_marked


def _name_of_splits(definition: Mapping[str, Any]) -> str:
    """Whose splitting and normalising these are; offsets of tokens do not matter here."""

    def without_offsets(value: object) -> object:
        if isinstance(value, dict):
            return {k: without_offsets(v) for k, v in value.items() if k != "trim_offsets"}
        return [without_offsets(v) for v in value] if isinstance(value, list) else value

    normaliser = definition.get("normalizer")
    is_plain = normaliser is None or normaliser == {"type": "Sequence", "normalizers": []}
    found = without_offsets(definition.get("pre_tokenizer"))
    takes_whole = bool(definition["model"].get("ignore_merges"))
    for name in SPLITS:
        is_like = takes_whole == (name in WHOLE_PIECES_FIRST)
        if is_plain and is_like and found == without_offsets(pre_tokenizer_of(name)):
            return name
    return UNKNOWN_PRE


def tokenizer_of(metadata: Mapping[str, Value], where: Path) -> Tokenizer:
    """The tokenizer in a file; TokenizerError if there is none, or one that is not ours."""
    definition = _definition_of(metadata, where)
    tokens = metadata[TOKENS] if isinstance(metadata.get(TOKENS), list) else []
    named = {}
    for kind, key in SPECIAL_IDS.items():
        token_id = metadata.get(key)
        if type(token_id) is int and 0 <= token_id < len(tokens):
            named[f"{kind}_token"] = tokens[token_id]
    template = metadata.get(TEMPLATE)
    chat_template = mended(template) if isinstance(template, str) else None
    return build(definition, where=where, chat_template=chat_template, **named)


def _definition_of(metadata: Mapping[str, Value], where: Path) -> dict[str, Any]:
    whole = metadata.get(WHOLE)
    if isinstance(whole, str):
        try:
            definition = json.loads(whole)
        except NOT_JSON as problem:
            raise TokenizerError(f"{WHOLE} is not JSON: {problem}", where=where) from None
        if not isinstance(definition, dict):
            raise TokenizerError(f"{WHOLE} is not an object", where=where)
        return definition
    kind, pre = single(metadata, MODEL), single(metadata, PRE)
    if kind != "gpt2" or pre not in SPLITS:
        raise TokenizerError(
            "has no tokenizer that Rorqual knows",
            where=where,
            found=f"{MODEL} {kind!r}, {PRE} {pre!r}",
            expected=f"gpt2 and one of {', '.join(SPLITS)}",
            fix="take the model's own tokenizer.json",
        )
    return _definition(*_lists_of(metadata, where), pre)


def _lists_of(
    metadata: Mapping[str, Value], where: Path
) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    tokens, kinds, merges = metadata.get(TOKENS), metadata.get(KINDS), metadata.get(MERGES)
    has_ranks = merges is None and single(metadata, PRE) in WHOLE_PIECES_FIRST
    are_lists = isinstance(tokens, list) and (isinstance(merges, list) or has_ranks)
    if not are_lists or not isinstance(kinds, np.ndarray) or kinds.size != len(tokens or []):
        raise TokenizerError(
            "its token lists do not belong together",
            where=where,
            expected=f"{TOKENS} and {KINDS} of one length, and {MERGES}",
        )
    assert tokens is not None, "just checked"
    if has_ranks:  # llama.cpp needs no merges here: ids are ranks
        normal = [token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL]
        return tokens, kinds.tolist(), merges_of(normal, where)
    assert merges is not None, "just checked"
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or not left or not right or " " in right:
            raise TokenizerError(
                "a merge is no pair of tokens", where=where, found=repr(merge[:80])
            )
        pairs.append((left, right))
    return tokens, kinds.tolist(), pairs


def _definition(
    tokens: list[str], kinds: list[int], merges: list[tuple[str, str]], pre: str
) -> dict[str, Any]:
    """The `tokenizer.json` that gives these tokens with the pre-tokenizer of that name."""
    num_used = len(tokens)
    while num_used and kinds[num_used - 1] == UNUSED:
        num_used -= 1
    vocabulary: dict[str, int] = {}
    specials: dict[str, int] = {}
    for token_id, (token, kind) in enumerate(zip(tokens[:num_used], kinds, strict=False)):
        (specials if kind in (CONTROL, USER_DEFINED) else vocabulary)[token] = token_id
    return bpe_definition(vocabulary, merges, specials, pre)
