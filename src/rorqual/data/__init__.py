"""Text to tokens on disk, and batches out of them: sources, corpora, shards, the loader."""

from rorqual.data.build import Advance, BuildSummary, build, find_build, scan_sources, silent
from rorqual.data.corpus import Document, read_documents, write_documents
from rorqual.data.inputs import Inputs, find_files, inputs_now, loaded_tokenizer
from rorqual.data.loader import Batch, HeldOutBatch, Loader, held_out_bytes, num_samples, sequential
from rorqual.data.packing import Isolation, PackingCounts
from rorqual.data.plan import Generator, missing_sources
from rorqual.data.settings import DataSettings, SourceSettings, TokenizerSettings
from rorqual.data.shards import TokenFolder, open_tokens
from rorqual.data.sources import SOURCES, Source, fetch

__all__ = [
    "SOURCES",
    "Advance",
    "Batch",
    "BuildSummary",
    "DataSettings",
    "Document",
    "Generator",
    "HeldOutBatch",
    "Inputs",
    "Isolation",
    "Loader",
    "PackingCounts",
    "Source",
    "SourceSettings",
    "TokenFolder",
    "TokenizerSettings",
    "build",
    "fetch",
    "find_build",
    "find_files",
    "held_out_bytes",
    "inputs_now",
    "loaded_tokenizer",
    "missing_sources",
    "num_samples",
    "open_tokens",
    "read_documents",
    "scan_sources",
    "sequential",
    "silent",
    "write_documents",
]
