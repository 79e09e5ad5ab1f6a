"""What the tokens of a build are made of: enough to see what changed before a token is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.config import settings
from rorqual.data.plan import Generator, locate
from rorqual.data.selection import file_digest
from rorqual.data.settings import DataSettings, SourceSettings, TokenizerSettings
from rorqual.data.shards import fingerprint, tokenizer_hash, whole_record

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer

BUILD = "build.json"
# Choice: beyond it a source's files are one entry, so that a checkpoint's state stays small.
MAX_NAMED_FILES = 1000
UNKNOWN = ""  # of what is generated or trained by the build itself


@settings
class Inputs:
    """The digest of each file by source, and of the tokenizer; `UNKNOWN` is equal to any."""

    tokenizer: str
    files: dict[str, dict[str, str]]

    def changes_since(self, old: Inputs) -> list[str]:
        """What is another than in `old`, by name."""
        found = []
        if UNKNOWN not in (old.tokenizer, self.tokenizer) and old.tokenizer != self.tokenizer:
            found.append("the tokenizer is another")
        for label in sorted(old.files.keys() | self.files.keys()):
            before, now = old.files.get(label, {}), self.files.get(label, {})
            for file in sorted(before.keys() | now.keys()):
                if file not in now or file not in before:
                    found.append(f"{file} is {'new' if file in now else 'gone'} in {label}")
                elif UNKNOWN not in (before[file], now[file]) and before[file] != now[file]:
                    found.append(f"{file} has changed in {label}")
        return found


def find_files(data: DataSettings, generators: Mapping[str, Generator]) -> dict[str, list[Path]]:
    """The files of each source by its label; DataError for one that cannot be found.

    Those that are fetched or generated may not be there yet.
    """
    return {source.label: locate(data, source, generators) for source in data.sources}


def inputs_now(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    files: Mapping[str, Sequence[Path]],
    record: Mapping[str, Any] | None = None,
) -> Inputs:
    """The inputs as they lie in `files`, read only where they differ from those of the last build.

    `record` is that build's, where it was read already. Nothing is fetched, generated or trained.
    """
    if record is None:
        record = whole_record(Path(data.folder) / BUILD) or {}
    digests_then = record.get("digests", [])  # none in a build of an earlier version
    known = dict(zip(map(tuple, record.get("files", [])), digests_then, strict=False))
    digests = {label: [_digest(f, known) for f in own] for label, own in files.items()}
    path = tokenizer.path
    own_hash = tokenizer_hash(loaded_tokenizer(path)) if path.exists() else UNKNOWN
    return inputs_of(data.sources, files, digests, own_hash)


def inputs_of(
    sources: Sequence[SourceSettings],
    files: Mapping[str, Sequence[Path]],
    digests: Mapping[str, Sequence[str]],
    tokenizer: str,
) -> Inputs:
    """The inputs from each source's files and their digests."""
    named = {}
    for source in sources:
        own = files[source.label]
        # Folders of fetched and generated text may move, so there the name alone counts.
        names = [str(file) if source.path is not None else file.name for file in own]
        found = dict(zip(names, digests[source.label], strict=True))
        if len(found) > MAX_NAMED_FILES:
            found = {f"one of {source.path or source.label}": fingerprint(sorted(found.items()))}
        named[source.label] = found
    return Inputs(tokenizer=tokenizer, files=named)


def _digest(file: Path, known: Mapping[tuple[Any, ...], str]) -> str:
    return known.get(tuple(stamp(file))) or file_digest(file) if file.is_file() else UNKNOWN


def stamp(file: Path) -> list[Any]:
    """Name, size and time of a file: enough to see that it is that of the last whole build."""
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def loaded_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder or file, read once a process unless a file there changes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return _loaded(path, tuple(tuple(stamp(file)) for file in files if file.is_file()))


# Choice: two, that of the recipe and that of the checkpoint which it starts from.
@lru_cache(maxsize=2)
def _loaded(path: Path, stamps: tuple[tuple[Any, ...], ...]) -> Tokenizer:
    from rorqual.tokenizer import load_tokenizer

    return load_tokenizer(path)
