"""Opens a checkpoint of any kind. The kind is told by content: names of files decide nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from rorqual.errors import CheckpointError, RorqualError
from rorqual.files import mend_of
from rorqual.model import ModelConfig
from rorqual.weights.folder import CONFIG, open_folder, read_config
from rorqual.weights.gguf.format import MAGIC
from rorqual.weights.gguf.reader import open_gguf
from rorqual.weights.parameters_source import is_cut, open_cut, open_ema
from rorqual.weights.safetensors_file import looks_like_safetensors, read_places
from rorqual.weights.shards.names import is_shard_name
from rorqual.weights.shards.reader import open_shards
from rorqual.weights.source import TensorSource

SourceKind = Literal["huggingface", "shards", "gguf"]
UNFINISHED = ".rorqual-convert.json"  # what `convert` leaves in a folder that it has not finished


def kind_of(path: Path) -> SourceKind:
    """What lies at `path`, from its content.

    A folder without any weights counts as a Hugging Face folder, whose reader says what is missing.
    CheckpointError for a folder or file that the system does not let us read.
    """
    try:
        return _kind_of(path)
    except OSError as problem:
        place = problem.filename or path
        fix = mend_of(problem, place)
        raise CheckpointError(f"cannot be read: {problem}", where=path, fix=fix) from None


def _kind_of(path: Path) -> SourceKind:
    if path.is_file():
        return "gguf" if _is_gguf(path) else "huggingface"
    if not path.is_dir():
        return "huggingface"
    if (path / UNFINISHED).exists():
        raise CheckpointError(
            "a conversion into this folder is not finished",
            where=path,
            fix="run the same `rorqual convert` again: it goes on where it was",
        )
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    tensors = [file for file in files if looks_like_safetensors(file)]
    kinds = {kind for file in tensors if (kind := _kind_of_tensors(file)) is not None}
    if len(kinds) > 1:
        raise CheckpointError(
            "the folder holds both rank shards and a Hugging Face checkpoint",
            where=path,
            found=", ".join(file.name for file in tensors[:8]),
            fix="move one of the two into a folder of its own",
        )
    if kinds:
        return kinds.pop()
    return "gguf" if any(_is_gguf(file) for file in files) else "huggingface"


def open_source(path: str | os.PathLike[str], *, is_ema: bool = False) -> TensorSource:
    """The checkpoint at `path`: Hugging Face folder, rank shards or GGUF, or what several ranks of
    a training run saved; `is_ema`: the average of the parameters that a run keeps.

    CheckpointError or ConfigError for what cannot be opened at all; other faults are collected.
    """
    path = Path(path)
    if is_ema:
        return open_ema(path)
    if is_cut(path):
        return open_cut(path)
    kind = kind_of(path)
    if kind == "shards":
        return open_shards(path)
    if kind == "gguf":
        return open_gguf(path)
    return open_folder(path)


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The shape of a checkpoint of any kind; ConfigError or CheckpointError names what is wrong."""
    path = Path(path)
    if path.is_dir() and (path / CONFIG).is_file():  # the weights need not be there
        return read_config(path)
    with open_source(path) as source:
        return source.config


def _kind_of_tensors(file: Path) -> Literal["huggingface", "shards"] | None:
    try:
        names = read_places(file)
    except RorqualError:  # the reader reports it, with the rest that is wrong
        return None
    return "shards" if any(is_shard_name(name) for name in names) else "huggingface"


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC
