"""What a build reads: each source's files, fetched or generated, and the side on which each
document falls.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from rorqual.data.corpus import Document, corpus_files, read_file, write_documents
from rorqual.data.selection import (
    DROPPED,
    HELD_OUT,
    TRAIN,
    Scan,
    first_occurrences,
    held_out_of,
    limited,
    mix,
)
from rorqual.data.settings import GENERATED, DataSettings, SourceSettings
from rorqual.data.sources import CORPORA, DOCUMENTS, source_folder, source_record
from rorqual.errors import DataError, listing
from rorqual.log import logger

Generator = Callable[[int, int], Iterator[Document]]
BLOCKS, MIN_BLOCK_CHARACTERS, MAX_BLOCK_CHARACTERS = 64, 256, 1 << 16
PREVIEW_DOCUMENTS = 64  # enough to see that a generator has changed


@dataclass(frozen=True)
class Plan:
    """One source resolved: its settings, files and licence."""

    settings: SourceSettings
    files: list[Path]
    licence: str

    @property
    def block_characters(self) -> int:
        """The size of the blocks in which .txt files are held out: a 64th of all of the source's,
        so that a share of one file can be held out, while files among many stay whole.
        """
        size = sum(file.stat().st_size for file in self.files if file.suffix.lower() == ".txt")
        return min(max(size // BLOCKS, MIN_BLOCK_CHARACTERS), MAX_BLOCK_CHARACTERS)


def resolve(
    data: DataSettings,
    source: SourceSettings,
    generators: Mapping[str, Generator],
) -> Plan:
    """Finds or generates the files of a source; one of packages lies there already."""
    licence = source.licence
    if source.is_packaged:
        record = source_record(source.name or "", Path(data.corpora))
        assert record is not None, "check_fetched comes first"
        licence = record["licence"]
    files = locate(data, source, generators)
    if source.is_generated and not files[0].is_file():
        count = source.max_documents or 0
        generate = generators[_generator_name(source)]
        write_documents(files[0], islice(generate(data.seed, count), count))
    return Plan(source, files, licence or ("generated" if source.is_generated else "not stated"))


def missing_sources(data: DataSettings) -> list[str]:
    """The sources of packages that lie in no corpora folder yet."""
    corpora = Path(data.corpora)
    names = [source.name or "" for source in data.sources if source.is_packaged]
    return [name for name in names if source_record(name, corpora) is None]


def check_fetched(data: DataSettings) -> None:
    """DataError for sources of packages that are not there: `data fetch` alone uses the network."""
    missing = missing_sources(data)
    if missing:
        option = "" if data.corpora == str(CORPORA) else f" --corpora {shlex.quote(data.corpora)}"
        raise DataError(
            f"these sources have not been fetched: {listing(missing)}",
            where=data.corpora,
            fix=f"rorqual data fetch {' '.join(missing)}{option}",
        )


def locate(
    data: DataSettings, source: SourceSettings, generators: Mapping[str, Generator]
) -> list[Path]:
    """Where the files of a source lie, or will when they are fetched or generated.

    DataError for a path without files and for an unknown generator.
    """
    if source.path is not None:
        return corpus_files(source.path)
    if source.is_generated:
        return [_generated_file(data, source, generators)]
    return [source_folder(source.name or "", Path(data.corpora)) / DOCUMENTS]


def _generator_name(source: SourceSettings) -> str:
    return (source.name or "").removeprefix(GENERATED)


def _generated_file(
    data: DataSettings, source: SourceSettings, generators: Mapping[str, Generator]
) -> Path:
    """Its name tells the generator's versions apart by their first documents."""
    name = _generator_name(source)
    if name not in generators:
        raise DataError(
            "no such generator",
            where=source.name,
            expected=listing(sorted(generators)) or "none known",
            fix="correct the name in [[data.sources]]",
        )
    count = source.max_documents or 0
    preview = [
        document.as_record()
        for document in islice(generators[name](data.seed, count), PREVIEW_DOCUMENTS)
    ]
    if not preview:
        raise DataError("the generator gave nothing", where=source.name, fix="raise max_documents")
    version = hashlib.blake2b(
        json.dumps([data.seed, count, preview]).encode(), digest_size=6
    ).hexdigest()
    return Path(data.folder) / "generated" / f"{source.label}-{version}.jsonl.gz"


def select(
    plans: Sequence[Plan], scans: Sequence[Scan], data: DataSettings
) -> tuple[list[np.ndarray], list[int]]:
    """For each file the code of each document (TRAIN, HELD_OUT, DROPPED); for each plan its
    duplicates.
    """
    hashes = np.concatenate([scan.hashes for scan in scans])
    text_bytes = np.concatenate([scan.text_bytes for scan in scans])
    is_first = first_occurrences(hashes) if data.dedupe else np.ones(len(hashes), dtype=bool)
    codes = np.full(len(hashes), DROPPED, dtype=np.uint8)
    duplicates = []
    start = number = 0
    for plan in plans:
        here = scans[number : number + len(plan.files)]
        number += len(plan.files)
        part = slice(start, start + sum(len(scan.hashes) for scan in here))
        start = part.stop
        duplicates.append(int((~is_first[part]).sum()))
        _check_not_empty(plan, here)
        maximum = None if plan.settings.is_generated else plan.settings.max_documents
        is_kept = limited(
            hashes[part], text_bytes[part], is_first[part], maximum, plan.settings.max_bytes
        )
        share = data.held_out_share(plan.settings)
        is_held_out = held_out_of(hashes[part], is_kept, share, data.seed)
        label = plan.settings.label
        if not is_kept.any():
            logger(__name__).warning(
                "%s: none of its %d documents is kept (%d are duplicates; see its limits)",
                label, len(is_kept), duplicates[-1],
            )  # fmt: skip
        elif share > 0 and not is_held_out.any():
            logger(__name__).warning("%s: it is one document, so nothing is held out", label)
        codes[part] = np.where(is_kept, np.where(is_held_out, HELD_OUT, TRAIN), DROPPED)
    ends = np.cumsum([len(scan.hashes) for scan in scans])[:-1]
    return np.split(codes, ends), duplicates


def _check_not_empty(plan: Plan, scans: Sequence[Scan]) -> None:
    """DataError for a source of which nothing can be learnt; a warning for such documents."""
    num_documents, num_empty = (
        sum(len(scan.hashes) for scan in scans),
        sum(scan.num_empty for scan in scans),
    )
    if num_empty == num_documents:
        raise DataError(
            "there is nothing to learn in this source",
            where=listing(plan.files),
            found=f"{num_documents:,} documents, all of them empty"
            if num_documents
            else "no document",
            expected="text, or conversations in which the assistant says something",
            fix="fill the file, or remove the source from [[data.sources]]",
        )
    if num_empty:
        logger(__name__).warning(
            "%s: %d of its %d documents teach nothing: no text, or no words of an assistant",
            plan.settings.label,
            num_empty,
            num_documents,
        )


def tokenizer_sample(
    plans: Sequence[Plan],
    scans: Sequence[Scan],
    codes: Sequence[np.ndarray],
    num_bytes: int,
    seed: int,
) -> Iterator[str]:
    """Training texts of about `num_bytes`: equal shares of the sources; what a small one leaves
    goes to the rest.

    Documents are drawn by their hash, and held-out ones are not among them. Conversations give the
    contents of their messages.
    """
    ends = np.cumsum([len(plan.files) for plan in plans])
    files = [range(end - len(plan.files), end) for end, plan in zip(ends, plans, strict=True)]
    sizes = [
        sum(int(scans[f].text_bytes[codes[f] == TRAIN].sum(dtype=np.int64)) for f in own)
        for own in files
    ]
    key = mix(np.uint64(seed % 2**64))
    chances = _chances(sizes, num_bytes)
    for plan, own, chance in zip(plans, files, chances, strict=True):
        for file, number in zip(plan.files, own, strict=True):
            draws = mix(scans[number].hashes["high"] ^ key) / 2.0**64
            is_taken = (codes[number] == TRAIN) & (draws < chance)
            documents = read_file(file, block_characters=plan.block_characters)
            for document, taken in zip(documents, is_taken, strict=True):
                if taken:
                    yield from _texts(document)


def _chances(sizes: Sequence[int], num_bytes: int) -> list[float]:
    """The share of each source that makes equal numbers of bytes, as far as the sources reach."""
    chances = [0.0] * len(sizes)
    remaining = num_bytes
    for rank, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        taken = min(sizes[index], remaining // (len(sizes) - rank))
        chances[index] = taken / sizes[index] if sizes[index] else 0.0
        remaining -= taken
    return chances


def _texts(document: Document) -> list[str]:
    if document.text is not None:
        return [document.text]
    return [str(message.get("content") or "") for message in document.messages or []]
