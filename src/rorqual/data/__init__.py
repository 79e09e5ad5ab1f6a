"""Text to tokens on disk, and batches out of them: sources, corpora, shards, the loader."""

from rorqual.data.build import BuildSummary, build
from rorqual.data.corpus import Document, read_documents, write_documents
from rorqual.data.loader import Batch, HeldOutBatch, Loader, held_out_bytes, num_samples, sequential
from rorqual.data.packing import Isolation, PackingCounts
from rorqual.data.settings import DataSettings, SourceSettings, TokenizerSettings
from rorqual.data.shards import TokenFolder, open_tokens
from rorqual.data.sources import SOURCES, Source, fetch

__all__ = [
    "SOURCES",
    "Batch",
    "BuildSummary",
    "DataSettings",
    "Document",
    "HeldOutBatch",
    "Isolation",
    "Loader",
    "PackingCounts",
    "Source",
    "SourceSettings",
    "TokenFolder",
    "TokenizerSettings",
    "build",
    "fetch",
    "held_out_bytes",
    "num_samples",
    "open_tokens",
    "read_documents",
    "sequential",
    "write_documents",
]
