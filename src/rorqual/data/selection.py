"""Which documents of a build are kept, and on which side of the held-out split they fall.

Everything follows from a document's 16-byte hash, so neither the order of files nor the number of
workers matters: of equal documents the first one (in the order of sources and files) stays; a share
is held out by its hash; a limit takes the documents with the lowest hashes, which is a random
sample. The blocks of a long text count as documents here; the hash of one covers all before it, so
that a text may repeat itself. Memory: 16 bytes a document, about three times that while sorting.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rorqual.data.corpus import MAX_TEXT_CHARACTERS, Document, is_empty, num_text_bytes, read_file

DROPPED, TRAIN, HELD_OUT = 0, 1, 2
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True)
class Scan:
    """Of one file: each document's hash (HASH) and bytes of text (uint32); the hash of the file
    itself; and how many documents teach nothing.
    """

    hashes: np.ndarray
    text_bytes: np.ndarray
    digest: str
    has_messages: bool
    has_texts: bool
    num_empty: int


def document_hash(document: Document) -> bytes:
    """16 bytes of blake2b over the normalised document: NFC, each run of white space one space."""
    if document.text is not None:
        normal = " ".join(unicodedata.normalize("NFC", document.text).split())
    else:
        normal = json.dumps(document.as_record(), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()


def scan_file(path: Path, block_characters: int = MAX_TEXT_CHARACTERS) -> Scan:
    """Hashes the documents of a file, and the file."""
    hashes = bytearray()
    sizes = []
    has_messages = has_texts = False
    num_empty = 0
    last = b""
    for document in read_file(path, block_characters=block_characters):
        found = document_hash(document)
        if document.is_continued:
            found = hashlib.blake2b(last + found, digest_size=16).digest()
        last = found
        hashes += found
        sizes.append(num_text_bytes(document))
        has_messages = has_messages or document.messages is not None
        has_texts = has_texts or document.text is not None
        num_empty += is_empty(document)
    return Scan(
        np.frombuffer(bytes(hashes), dtype=HASH),
        np.array(sizes, dtype=np.uint32),
        file_digest(path),
        has_messages,
        has_texts,
        num_empty,
    )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def first_occurrences(hashes: np.ndarray) -> np.ndarray:
    """Boolean array: True where a hash occurs for the first time."""
    order = np.lexsort((np.arange(len(hashes)), hashes["low"], hashes["high"]))
    ordered = hashes[order]
    is_new = np.ones(len(hashes), dtype=bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    is_first = np.empty(len(hashes), dtype=bool)
    is_first[order] = is_new
    return is_first


def held_out_mask(hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Boolean array: True for about `share` of the documents, the same ones in every build with
    this seed.
    """
    return mix(hashes["low"] ^ mix(np.uint64(seed))) < np.uint64(min(share, 1.0) * (2**64 - 2048))


def held_out_of(hashes: np.ndarray, is_kept: np.ndarray, share: float, seed: int) -> np.ndarray:
    """`held_out_mask` of the kept documents, but at least one of them and never all.

    Where the hashes say otherwise, the document nearest to the limit changes sides. Of fewer
    than two documents none can be held out.
    """
    is_held_out = held_out_mask(hashes, share, seed) & is_kept
    places = np.flatnonzero(is_kept)
    if share > 0 and len(places) > 1 and is_held_out.sum() in (0, len(places)):
        draws = mix(hashes["low"][places] ^ mix(np.uint64(seed)))
        moved = draws.argmax() if is_held_out.any() else draws.argmin()
        is_held_out[places[moved]] ^= True
    return is_held_out if len(places) > 1 else np.zeros_like(is_kept)


def limited(
    hashes: np.ndarray,
    text_bytes: np.ndarray,
    is_kept: np.ndarray,
    max_documents: int | None,
    max_bytes: int | None,
) -> np.ndarray:
    """`is_kept` narrowed to the documents of the lowest hashes that stay within both limits."""
    if max_documents is None and max_bytes is None:
        return is_kept
    places = np.flatnonzero(is_kept)
    places = places[np.lexsort((hashes["low"][places], hashes["high"][places]))]
    if max_bytes is not None:
        places = places[np.cumsum(text_bytes[places].astype(np.int64)) <= max_bytes]
    if max_documents is not None:
        places = places[:max_documents]
    result = np.zeros_like(is_kept)
    result[places] = True
    return result


def mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's finaliser: 64 well-mixed bits from 64 (Steele et al. 2014).

    Choice: our own generator for whatever order training depends on, since numpy does not promise
    that its streams stay the same between versions.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(values, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(values ^ (values >> np.uint64(31)))


def permutation(length: int, *seeds: int) -> np.ndarray:
    """A permutation of 0..length-1 (int64) that depends on `seeds` alone."""
    key = np.uint64(0)
    for seed in seeds:
        key = np.uint64(mix(key ^ np.uint64(seed % 2**64)))
    return np.argsort(mix(np.arange(length, dtype=np.uint64) ^ key), kind="stable")
