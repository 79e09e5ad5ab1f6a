"""The loader: samples out of token folders in an order that follows from one sample counter.

A source's documents lie end to end; sample i holds tokens [i*L, i*L + S) with L the sequence length
and S = L + 1 + D for MTP depth D, so samples overlap by 1 + D tokens and each token but a source's
first is the next-token target of exactly one sample. The last sample of a source is padded and its
padding masked. Documents are packed without a cross-document attention mask (report §4.1), unless
an `Isolation` asks for one; conversations are then packed whole (`packing.py`). A pass visits each
source `epochs` times; its order is a permutation of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rorqual.data.packing import Isolation, PackedStream, PackingCounts
from rorqual.data.selection import permutation
from rorqual.data.shards import TokenFolder, open_tokens
from rorqual.data.streams import CutStream, Sample, SampleStream
from rorqual.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

# B samples, S tokens of a sample


@dataclass(frozen=True)
class Batch:
    """tokens_BS int64; mask_BS bool, True where a token counts as a target.

    `documents_BS` int64 where documents are isolated: each sample's are numbered from 1, and 0 is
    padding. `extras` is what the loss of a stage needs besides, by name, a row for each sample.
    """

    tokens_BS: Tensor
    mask_BS: Tensor
    documents_BS: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Loader:
    """Batches of training samples from token folders, each visited `epochs` times a pass.

    All state is the caller's sample counter: `batch(counter, n)` is the same whoever asks, and rank
    r of w gets the r-th of w equal slices. A fraction of an epoch takes a new part of its source
    each pass, until all was seen. Memory: 16 bytes for each sample of a pass, and again while two
    passes meet in a batch. `packing` says what became of documents that are packed whole.
    """

    def __init__(
        self,
        folders: Sequence[tuple[str | Path, float]],
        sequence_length: int,
        mtp_depth: int = 0,
        seed: int = 0,
        isolation: Isolation | None = None,
    ) -> None:
        if sequence_length < 1 or mtp_depth < 0:
            raise UsageError(
                "no samples of this length",
                found=f"sequence {sequence_length}, MTP {mtp_depth}",
                expected="sequence_length >= 1 and mtp_depth >= 0",
                fix="correct the recipe",
            )
        negative = [str(path) for path, epochs in folders if not 0 <= epochs < float("inf")]
        if negative:
            raise UsageError(
                "epochs must be zero or more", where=negative[0], fix="correct [data] sources"
            )
        opened = [open_tokens(path) for path, _ in folders]
        _check_same_tokenizer(opened)
        self.seed = seed
        self.epochs = [epochs for _, epochs in folders]
        self.sequence_length = sequence_length
        self.streams: list[SampleStream] = []
        self.packing: PackingCounts | None = None
        for source, (folder, epochs) in enumerate(zip(opened, self.epochs, strict=True)):
            stream = _stream(folder, sequence_length, mtp_depth, isolation, (seed, 3, source))
            self.streams.append(stream)
            if isinstance(stream, PackedStream) and epochs:
                self.packing = (self.packing or PackingCounts()) + stream.counts
        self.num_taken = [
            round(epochs * stream.num_samples)
            for epochs, stream in zip(self.epochs, self.streams, strict=True)
        ]
        if not sum(self.num_taken):
            raise DataError(
                "there is not one sample to train on",
                where=", ".join(str(path) for path, _ in folders) or "no folders",
                fix="raise the epochs of a source"
                if any(stream.num_samples for stream in self.streams)
                else "add text; of conversations, such whose assistant speaks within "
                "training.sequence_length tokens",
            )
        self._pass_order = lru_cache(maxsize=2)(self._make_pass_order)

    @property
    def samples_per_pass(self) -> int:
        return sum(self.num_taken)

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        """The samples [counter, counter + num_samples) of the endless order; of these, the rank's
        slice.

        B = num_samples / world. UsageError if that is no whole number.
        """
        if counter < 0 or num_samples < 1 or num_samples % world or not 0 <= rank < world:
            raise UsageError(
                "a batch cannot be divided so",
                found=f"counter {counter}, {num_samples} samples, rank {rank} of {world}",
                expected="a batch size that the number of ranks divides",
                fix="change the batch size or the number of ranks",
            )
        share = num_samples // world
        first = counter + rank * share
        return _batch([self._sample(index) for index in range(first, first + share)])

    def locate(self, counter: int) -> tuple[int, int]:
        """(source, sample of that source) at a place of the endless order."""
        number, place = divmod(counter, self.samples_per_pass)
        source, sample = self._pass_order(number)
        return int(source[place]), int(sample[place])

    def _sample(self, counter: int) -> Sample:
        source, sample = self.locate(counter)
        return self.streams[source].sample(sample)

    def _make_pass_order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample) arrays of one pass, int32 and int64, in the order of training."""
        sources, samples = [], []
        for source, (stream, taken) in enumerate(zip(self.streams, self.num_taken, strict=True)):
            if not taken:
                continue
            # A window that moves over one fixed permutation: after 1/fraction passes every sample
            # was seen.
            places = (np.arange(taken) + number * taken) % stream.num_samples
            samples.append(permutation(stream.num_samples, self.seed, 1, source)[places])
            sources.append(np.full(taken, source, dtype=np.int32))
        order = permutation(self.samples_per_pass, self.seed, 2, number)
        return np.concatenate(sources)[order], np.concatenate(samples)[order]


def num_samples(folder: str | Path, sequence_length: int, isolation: Isolation | None) -> int:
    """How many samples a folder gives; none of conversations without a target that fits."""
    return _stream(open_tokens(folder), sequence_length, 0, isolation, (0,)).num_samples


def _stream(
    folder: TokenFolder,
    sequence_length: int,
    mtp_depth: int,
    isolation: Isolation | None,
    seeds: tuple[int, ...],
) -> SampleStream:
    if isolation is not None and isolation.is_whole:
        return PackedStream(folder, sequence_length, mtp_depth, isolation, seeds)
    begin_id = isolation.begin_id if isolation is not None else None
    return CutStream(folder, sequence_length, mtp_depth, begin_id)


def held_out_bytes(folders: Sequence[str | Path]) -> int:
    """UTF-8 bytes of the text whose tokens are targets in these folders: the divisor of bits per
    byte.
    """
    return sum(open_tokens(path).text_bytes for path in folders)


def _batch(samples: list[Sample]) -> Batch:
    import torch

    def stacked(rows: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(list(rows)))

    documents = [sample.documents_S for sample in samples if sample.documents_S is not None]
    return Batch(
        stacked(sample.tokens_S for sample in samples),
        stacked(sample.mask_S for sample in samples),
        stacked(documents) if documents else None,
    )


def _check_same_tokenizer(folders: Sequence[TokenFolder]) -> None:
    hashes = {folder.manifest.get("tokenizer"): folder.path for folder in folders}
    if len(hashes) > 1:
        raise DataError(
            "the folders were tokenised with different tokenizers",
            where=", ".join(map(str, hashes.values())),
            expected="one tokenizer for all",
            fix="build them again with one recipe",
        )
