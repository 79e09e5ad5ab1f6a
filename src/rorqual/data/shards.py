"""Token shards: a folder with `manifest.json`, `*.tokens` (uint16 or uint32) and, for
conversations, `*.mask` (uint8).

A corpus file becomes one shard a split. A shard's little record `*.json` is written last, with a
fingerprint of all that went into it: a run that finds the same fingerprint skips the shard, so a
killed build goes on where it was. Every document is BOS, text, EOS; fill-in-the-middle and
punctuation splitting touch the training split alone, so that bits per byte on the held-out text
mean the same for every recipe.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rorqual.data.corpus import MAX_TEXT_CHARACTERS, Document, num_text_bytes, read_file
from rorqual.data.fim import fim_ids, fim_pieces
from rorqual.data.punctuation import PunctuationSplitter
from rorqual.data.selection import HELD_OUT, TRAIN, document_hash
from rorqual.errors import DataError
from rorqual.files import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer

FORMAT = "rorqual-tokens-1"
MANIFEST = "manifest.json"
SPLITS = {TRAIN: "train", HELD_OUT: "held_out"}
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20  # a tokenizer takes some hundred bytes a character


@dataclass(frozen=True)
class ShardSettings:
    """What the tokens of a shard depend on besides text and tokenizer."""

    fim_rate: float
    split_punctuation_rate: float
    seed: int
    has_mask: bool


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its name without suffix, counts, and the fingerprint of its inputs.

    `text_bytes` counts UTF-8 bytes of text; of a conversation only the assistant's words, which are
    the targets.
    """

    name: str
    num_tokens: int
    num_targets: int
    num_documents: int
    text_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class TokenFolder:
    """An opened folder of shards; `tokens` and `masks` are memory-mapped, one array a shard."""

    path: Path
    manifest: dict[str, Any]
    tokens: list[np.ndarray]
    masks: list[np.ndarray] | None

    @property
    def num_tokens(self) -> int:
        return int(self.manifest["num_tokens"])

    @property
    def text_bytes(self) -> int:
        return int(self.manifest["text_bytes"])


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size < 1 << 16 else np.dtype("<u4")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Tells two tokenizers apart: blake2b of the definition and the chat template."""
    text = tokenizer.definition + "\0" + tokenizer.chat_template
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class DocumentEncoder:
    """Documents to (ids, mask); what is random in it is seeded by the document's own hash."""

    def __init__(self, tokenizer: Tokenizer, settings: ShardSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.splitter = PunctuationSplitter(tokenizer, settings.split_punctuation_rate)

    def encode(
        self, documents: Sequence[Document], is_training: bool
    ) -> Iterator[tuple[list[int], list[int] | None]]:
        """(ids, mask) of each document; the mask is None for text: every token is a target."""
        rngs = [self._rng(document) if is_training else None for document in documents]
        pieces: list[list[str]] = []
        for document, rng in zip(documents, rngs, strict=True):
            if document.text is None:
                pieces.append([])
            elif rng is not None and rng.random() < self.settings.fim_rate:
                pieces.append(list(fim_pieces(document.text, rng)))
            else:
                pieces.append([document.text])
        encoded = iter(self.tokenizer.encode_batch([text for group in pieces for text in group]))
        for document, rng, group in zip(documents, rngs, pieces, strict=True):
            if document.messages is not None:
                ids, mask = self.tokenizer.encode_training(document.messages, document.tools)
                self._check_beginning(ids, document)
                yield ids, mask
                continue
            parts = [next(encoded) for _ in group]
            if rng is not None:
                parts = [self.splitter.split(ids, rng) for ids in parts]
            if len(parts) == 3:
                prefix, middle, suffix = parts
                yield fim_ids(prefix, middle, suffix, self.tokenizer), None
            else:
                yield [self.tokenizer.bos_id, *parts[0], self.tokenizer.eos_id], None

    def _check_beginning(self, ids: list[int], document: Document) -> None:
        """The begin-of-sentence id tells documents apart, so each has it once, and first."""
        begin_id = self.tokenizer.bos_id
        if ids[:1] != [begin_id] or ids.count(begin_id) != 1:
            raise DataError(
                "a conversation does not begin with the only begin-of-sentence token",
                where=document.source or None,
                found=f"{ids.count(begin_id)} of them",
                expected=f"{self.tokenizer.bos_token} once, at the start",
                fix="mend the tokenizer's chat template",
            )

    def _rng(self, document: Document) -> random.Random:
        seed = self.settings.seed.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(document_hash(document), digest_size=16, key=seed).digest()
        return random.Random(int.from_bytes(digest, "little"))


def write_shards(
    file: Path,
    codes: np.ndarray,
    name: str,
    folder: Path,
    tokenizer: Tokenizer,
    settings: ShardSettings,
    inputs: str,
    block_characters: int = MAX_TEXT_CHARACTERS,
) -> None:
    """Tokenises the documents of `file` into `folder`/train and `folder`/held_out as shard `name`.

    codes: (documents of the file,) uint8 of TRAIN, HELD_OUT or DROPPED. inputs: a fingerprint of
    file and codes.
    """
    encoder = None
    for code, split in SPLITS.items():
        key = fingerprint(inputs, split, tokenizer_hash(tokenizer), asdict(settings), FORMAT)
        token_bytes = token_dtype(tokenizer.vocab_size).itemsize
        if _is_finished(folder / split, name, key, token_bytes, settings):
            continue
        encoder = encoder or DocumentEncoder(tokenizer, settings)
        (folder / split).mkdir(parents=True, exist_ok=True)
        documents = _taken(file, codes == code, block_characters)
        _write_shard(documents, folder / split, name, encoder, code == TRAIN, key)


def write_manifest(folder: Path, names: Sequence[str], details: dict[str, Any]) -> dict[str, Any]:
    """Sums up the finished shards of one split in `manifest.json`, which makes the folder whole."""
    records = [read_json(folder / f"{name}.json", DataError) for name in names]
    totals = ("num_documents", "num_tokens", "num_targets", "text_bytes")
    manifest = {
        "format": FORMAT,
        **details,
        **{key: sum(record[key] for record in records) for key in totals},
        "shards": records,
    }
    if whole_record(folder / MANIFEST) != manifest:
        write_json(folder / MANIFEST, manifest)
    return manifest


def open_tokens(folder: str | Path) -> TokenFolder:
    """Opens a folder of shards by memory map; DataError if the manifest and the files disagree."""
    folder = Path(folder)
    mend = "build it again with `rorqual data build RECIPE`"
    if not (folder / MANIFEST).is_file():
        raise DataError(
            "no token shards here, or a build that did not end",
            where=folder,
            expected=f"a folder with {MANIFEST}",
            fix=mend,
        )
    try:
        manifest = read_json(folder / MANIFEST, DataError)
    except DataError as problem:
        raise DataError(problem.what, where=problem.where, fix=mend) from None
    if manifest.get("format") != FORMAT:
        raise DataError(
            "is not a folder of token shards",
            where=folder / MANIFEST,
            found=f"format {manifest.get('format')!r}",
            expected=FORMAT,
            fix=mend,
        )
    tokens, masks = [], []
    try:
        dtype = np.dtype(manifest["dtype"])
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            count = int(shard["num_tokens"])
            tokens.append(_mapped(path.with_suffix(".tokens"), dtype, count, mend))
            if manifest["has_mask"]:
                masks.append(_mapped(path.with_suffix(".mask"), np.dtype(np.uint8), count, mend))
    except (KeyError, TypeError, ValueError) as problem:
        raise DataError(
            f"the manifest is broken: {problem!r}", where=folder / MANIFEST, fix=mend
        ) from None
    return TokenFolder(folder, manifest, tokens, masks if manifest["has_mask"] else None)


def _mapped(path: Path, dtype: np.dtype[Any], count: int, mend: str) -> np.ndarray:
    found = path.stat().st_size if path.is_file() else None
    if found != count * dtype.itemsize:
        raise DataError(
            "has another size than the manifest says" if found is not None else "no such file",
            where=path,
            found=found,
            expected=f"{count * dtype.itemsize} bytes",
            fix=mend,
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)


def whole_record(path: Path) -> dict[str, Any] | None:
    """A JSON file of a build; None if it is missing or broken, for then it is made again."""
    try:
        return read_json(path, DataError)
    except DataError:
        return None


def _is_finished(
    folder: Path, name: str, key: str, token_bytes: int, settings: ShardSettings
) -> bool:
    record = whole_record(folder / f"{name}.json")
    if record is None or record.get("fingerprint") != key:
        return False
    sizes = {"tokens": token_bytes, **({"mask": 1} if settings.has_mask else {})}
    paths = {folder / f"{name}.{suffix}": size for suffix, size in sizes.items()}
    return all(
        path.is_file() and path.stat().st_size == record.get("num_tokens", 0) * size
        for path, size in paths.items()
    )


def _write_shard(
    documents: Iterator[Document],
    folder: Path,
    name: str,
    encoder: DocumentEncoder,
    is_training: bool,
    key: str,
) -> None:
    dtype = token_dtype(encoder.tokenizer.vocab_size)
    counts = dict.fromkeys(("num_tokens", "num_targets", "num_documents", "text_bytes"), 0)
    has_mask = encoder.settings.has_mask
    # Nothing may vouch for the old tokens once the new ones begin to take their place.
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    (folder / f"{name}.mask").unlink(missing_ok=True)
    with ExitStack() as stack:
        tokens = stack.enter_context(atomic_write(folder / f"{name}.tokens"))
        masks = stack.enter_context(atomic_write(folder / f"{name}.mask")) if has_mask else None
        for batch in _batches(documents):
            counts["text_bytes"] += sum(num_text_bytes(document) for document in batch)
            for ids, mask in encoder.encode(batch, is_training):
                tokens.write(np.asarray(ids, dtype=dtype).tobytes())
                targets = (
                    np.ones(len(ids), np.uint8) if mask is None else np.asarray(mask, np.uint8)
                )
                if masks is not None:
                    masks.write(targets.tobytes())
                counts["num_tokens"] += len(ids)
                counts["num_targets"] += int(targets.sum())
                counts["num_documents"] += 1
    write_json(folder / f"{name}.json", asdict(ShardRecord(name=name, fingerprint=key, **counts)))


def _taken(file: Path, is_taken: np.ndarray, block_characters: int) -> Iterator[Document]:
    """The taken documents; taken blocks of one text that follow each other are one document again,
    up to the length that memory bounds.
    """
    blocks: list[str] = []
    size = 0
    flags = iter(is_taken.tolist())
    for document in read_file(file, block_characters=block_characters):
        taken = next(flags, None)
        if taken is None:
            break
        is_joined = taken and document.is_continued and size < MAX_TEXT_CHARACTERS
        if blocks and not is_joined:
            yield Document(text="".join(blocks))
            blocks, size = [], 0
        if taken and document.text is None:
            yield document
        elif taken and document.text is not None:
            blocks.append(document.text)
            size += len(document.text)
    else:
        taken = next(flags, None)
        if blocks:
            yield Document(text="".join(blocks))
        if taken is None:
            return
    raise DataError(
        "changed while it was read", where=file, fix="build again when nothing writes to it"
    )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Some hundreds at a time or fewer if they are long."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "")
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
