"""Kimi-K2's and Moonlight's tokenizers: a `tiktoken.model` and what `tokenizer_config.json` says.

Source: the format of `load_tiktoken_bpe` in github.com/openai/tiktoken (a line is a token's bytes
in base64 and its rank, which is its id). The folders' `tokenization_*.py` is never run: all it adds
are the expression in `splits` and 256 ids behind the tokens, `<|reserved_token_N|>` where the
configuration has no name for them.

tiktoken has no list of merges: it joins the neighbours that make the token of the lowest rank.
Every pair of tokens that makes a token, in the order of what they make, gives the same: of several
pairs for one token only the one that its own bytes are joined by ever meets.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.files import mend_of, stand_in
from rorqual.tokenizer.definition import bpe_definition, byte_alphabet

FILE = "tiktoken.model"
NUM_RESERVED = 256
MAX_DIGITS = 9  # of an id
MAX_TOKEN_BYTES = 4096  # the longest of any vocabulary in use, a row of blanks, has 256
CLASS = "TikTokenTokenizer"
CONFIG = "tokenizer_config.json"
_RESTORE = f"restore {FILE} from the model's source"


def tiktoken_definition(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` that is equal to a `tiktoken.model` with its tokenizer_config."""
    declared = config.get("tokenizer_class", CLASS)
    if declared != CLASS:
        raise TokenizerError(
            "belongs to a tokenizer that is not supported",
            where=path,
            found=f"tokenizer_class {declared!r}",
            expected=f"{CLASS}, as Kimi-K2 and Moonlight have",
            fix="write a tokenizer.json with transformers: save_pretrained() of a fast tokenizer",
        )
    ranks = _read_ranks(path)
    letter_of = {byte: letter for letter, byte in byte_alphabet().items()}
    tokens = ["".join([letter_of[byte] for byte in token]) for token in ranks]
    vocabulary = {token: rank for rank, token in enumerate(tokens)}
    specials = _specials(config, len(tokens), path.with_name(CONFIG))
    return bpe_definition(vocabulary, merges_of(tokens, path), specials, "kimi-k2")


def merges_of(tokens: Iterable[str], where: object) -> list[tuple[str, str]]:
    """The merges of tokens in the order of their ranks, each byte a character."""
    known: set[str] = set()
    merges = []
    for token in tokens:
        if len(token) > MAX_TOKEN_BYTES:  # the work grows with the square
            raise TokenizerError(
                "a token is too long to be one",
                where=where,
                found=f"{len(token):,} bytes from {token[:20]!a} on",
                expected=f"at most {MAX_TOKEN_BYTES:,}",
                fix="restore the tokenizer from the model's source",
            )
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                merges.append((left, right))
        known.add(token)
    return merges


def _read_ranks(path: Path) -> list[bytes]:
    """The tokens by rank, which are the ids 0, 1, 2, ..."""
    if (found := stand_in(path)) is not None:
        raise TokenizerError(found.what, where=path, fix=found.fix)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as problem:
        fix = mend_of(problem, path)
        raise TokenizerError(f"cannot be read: {problem}", where=path, fix=fix) from None
    tokens: list[bytes] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            is_next = int(rank) == len(tokens)
        except (ValueError, binascii.Error):
            is_next = False
        if not is_next or not token:
            raise TokenizerError(
                f"line {number} is not the next token",
                where=path,
                found=ascii(line[:60]),
                expected=f"a token in base64 and its rank {len(tokens)}",
                fix=_RESTORE,
            )
        tokens.append(token)
    if len(set(tokens)) < len(tokens):
        raise TokenizerError("has a token twice", where=path, fix=_RESTORE)
    return tokens


def _specials(config: dict[str, Any], first: int, where: Path) -> dict[str, int]:
    """Names and ids of the special tokens, which begin at `first`; `where` is the configuration."""
    named = {}
    decoder = config.get("added_tokens_decoder")
    for token_id, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        is_id = str(token_id).isdecimal() and len(str(token_id)) <= MAX_DIGITS
        if not is_id or not isinstance(content, str) or not content:
            raise TokenizerError(
                "has an added token without an id or a name",
                where=where,
                found=ascii({token_id: token})[:80],
                fix=f"restore {CONFIG} from the model's source",
            )
        named[int(token_id)] = content
    stop = max([first + NUM_RESERVED, *(token_id + 1 for token_id in named)])
    if stop > first + 10 * NUM_RESERVED or any(token_id < first for token_id in named):
        raise TokenizerError(
            f"{CONFIG} and {FILE} do not belong together",
            where=where,
            found=f"special ids {min(named)} to {max(named)}",
            expected=f"ids from {first} on, behind the tokens",
            fix="copy both files from one model",
        )
    specials = {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(first, stop)}
    if len(specials) < stop - first:
        twice = [(i, name) for i, name in named.items() if specials[name] != i]
        raise TokenizerError(
            "has one name twice among its added tokens",
            where=where,
            found=ascii(twice)[:80],
            fix=f"restore {CONFIG} from the model's source",
        )
    return specials
