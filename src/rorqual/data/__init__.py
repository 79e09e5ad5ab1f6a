"""Text to tokens on disk, and batches out of them: sources, corpora, shards, the loader."""

from rorqual.data.build import Advance, BuildSummary, build, find_build, scan_sources, silent
from rorqual.data.corpus import Document
from rorqual.data.inputs import Inputs, find_files, inputs_now, loaded_tokenizer
from rorqual.data.loader import Batch, Loader, held_out_bytes, num_samples
from rorqual.data.packing import Isolation
from rorqual.data.plan import Generator, missing_sources
from rorqual.data.settings import DataSettings, SourceSettings, TokenizerSettings
from rorqual.data.shards import open_tokens

__all__ = [
    "Advance",
    "Batch",
    "BuildSummary",
    "DataSettings",
    "Document",
    "Generator",
    "Inputs",
    "Isolation",
    "Loader",
    "SourceSettings",
    "TokenizerSettings",
    "build",
    "find_build",
    "find_files",
    "held_out_bytes",
    "inputs_now",
    "loaded_tokenizer",
    "missing_sources",
    "num_samples",
    "open_tokens",
    "scan_sources",
    "silent",
]
