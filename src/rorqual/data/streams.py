"""The shards of one folder as one row of tokens, and the samples that are cut out of it."""

# S tokens of a sample

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from rorqual.data.shards import TokenFolder

PADDING_ID = 0  # any valid id: masked as a target, and in no document where there are some


class Sample(NamedTuple):
    """tokens_S int64, mask_S bool; documents_S int64 (from 1, 0 is padding) where isolated."""

    tokens_S: np.ndarray
    mask_S: np.ndarray
    documents_S: np.ndarray | None


class SampleStream(Protocol):
    """The samples of one source, by number."""

    num_samples: int

    def sample(self, index: int) -> Sample:
        """Sample `index` of num_samples; reads the memory map only where it lies."""
        ...


class TokenRow:
    """The shards of one folder end to end."""

    def __init__(self, folder: TokenFolder) -> None:
        self.folder = folder
        self.starts = np.cumsum([0, *(len(shard) for shard in folder.tokens)])
        self.num_tokens = int(self.starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, mask bool) of the places start .. stop - 1; without masks all count."""
        tokens = np.empty(stop - start, dtype=np.int64)
        mask = np.ones(stop - start, dtype=bool)
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        place = start
        while place < stop:
            first = place - int(self.starts[shard])
            count = min(stop, int(self.starts[shard + 1])) - place
            here = slice(place - start, place - start + count)
            tokens[here] = self.folder.tokens[shard][first : first + count]
            if self.folder.masks is not None:
                mask[here] = self.folder.masks[shard][first : first + count]
            place += count
            shard += 1
        return tokens, mask


class CutStream:
    """Samples that overlap by 1 + MTP depth tokens: each token but the first is a target once.

    With `begin_id`, the id that opens a document, each sample's documents are numbered; what a cut
    has parted from its beginning is one too, since it is text all the same.
    """

    def __init__(
        self,
        folder: TokenFolder,
        sequence_length: int,
        mtp_depth: int,
        begin_id: int | None = None,
    ) -> None:
        self.row, self.begin_id = TokenRow(folder), begin_id
        self.sequence_length = sequence_length
        self.width = sequence_length + 1 + mtp_depth
        self.num_samples = -(-max(self.row.num_tokens - 1, 0) // sequence_length)

    def sample(self, index: int) -> Sample:
        start = index * self.sequence_length
        stop = min(start + self.width, self.row.num_tokens)
        tokens = np.full(self.width, PADDING_ID, dtype=np.int64)
        mask = np.zeros(self.width, dtype=bool)
        real = slice(0, stop - start)
        tokens[real], mask[real] = self.row.read(start, stop)
        if self.begin_id is None:
            return Sample(tokens, mask, None)
        documents = np.zeros(self.width, dtype=np.int64)
        is_beginning = tokens[real] == self.begin_id
        is_beginning[0] = True
        documents[real] = is_beginning.cumsum()
        return Sample(tokens, mask, documents)
