"""Packed weights, kept in the user's cache so that the next start only maps them.

One file a model and form. It fits as long as the model's files have the sizes and times, the shape
and a few pages in common with those that it was made of; else it is made anew, with a word.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import UsageError
from rorqual.files import atomic_write, cache_folder, explained, final_name
from rorqual.locks import FileLock
from rorqual.log import logger
from rorqual.model import ModelConfig
from rorqual.ops.native import ABI
from rorqual.weights.forms import WIDER, Form
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.packed_file import (
    UnfitError,
    num_bytes_of,
    read_header,
    read_parts,
    write_parts,
)
from rorqual.weights.progress import byte_progress
from rorqual.weights.source import TensorSource
from rorqual.weights.stored_parts import Parts

MIN_BYTES = 100_000_000  # what is less is packed in a tenth of a second
SHARE_OF_FREE = 0.5
SAMPLES, SAMPLE_BYTES = 4, 4096
ENDING = ".packed"
SEE = "rorqual cache list"
OTHER_VERSION = "another version of rorqual packed it"
CHANGED = "the model's files have changed"

log = logger("weights")


@dataclass(frozen=True)
class Fingerprint:
    """Of a model's files: [name, bytes, time of change] of each, and a digest of names, shapes and
    types of the tensors, of the model's shape, and of a few pages of each file.
    """

    path: str
    files: list[list[Any]]
    digest: str


def fingerprint(source: TensorSource) -> Fingerprint:
    digest = hashlib.sha256(json.dumps(source.config.to_hf(), sort_keys=True).encode())
    for name, entry in sorted(source.entries.items()):
        kinds = source.kinds(name) if isinstance(source, GgufSource) else [entry.dtype]
        digest.update(f"{name} {entry.file} {entry.shape} {kinds}\n".encode())
    files = []
    for path in _files(source):
        found = path.stat()
        files.append([path.name, found.st_size, found.st_mtime_ns])
        for sample in _samples(path, found.st_size):
            digest.update(sample)
    return Fingerprint(str(source.path.resolve()), files, digest.hexdigest())


def folder() -> Path:
    """Where they are kept; UsageError for a user without a home."""
    return cache_folder() / "packed"


def file_of(path: str, form: str) -> Path:
    """The file of a model, by the resolved path of its checkpoint, in a form."""
    title = re.sub(r"[^\w.-]", "_", Path(path).name.removesuffix(".gguf"))[:60]
    return folder() / f"{title}-{hashlib.sha256(path.encode()).hexdigest()[:12]}.{form}{ENDING}"


def find(made_of: Fingerprint, form: Form) -> tuple[ModelConfig, Parts] | None:
    """The parts that were kept; None, with a word where there are some that do not fit."""
    try:
        path = file_of(made_of.path, form.name)
        header = read_header(path)
        _check_fits(header, made_of, form)
        return ModelConfig.from_hf(header["config"], where=path), read_parts(path, header)
    except UnfitError as problem:
        log.info("%s: packed anew, since what was kept does not fit: %s", made_of.path, problem)
    except (UsageError, FileNotFoundError, NotADirectoryError):
        pass
    except OSError as problem:
        log.info("%s: packed weights that were kept cannot be read: %s", made_of.path, problem)
    return None


def _check_fits(header: dict[str, Any], made_of: Fingerprint, form: Form) -> None:
    if header["abi"] != ABI or header["form"] != _told(form):
        raise UnfitError(OTHER_VERSION)
    if header["source"]["files"] != made_of.files:
        raise UnfitError(CHANGED)
    if header["source"]["digest"] != made_of.digest:
        raise UnfitError("the model has changed")


def _told(form: Form) -> list[Any]:
    return [form.name, list(form.keeps), form.becomes, list(WIDER)]


def keep(
    source: TensorSource, made_of: Fingerprint, form: Form, config: ModelConfig, parts: Parts
) -> None:
    """Writes the parts where they take less than half of what is free, and says what it did. Who
    comes while another process writes the same leaves it to that one.
    """
    size = num_bytes_of(parts)
    if size < MIN_BYTES:
        return
    try:
        path = file_of(made_of.path, form.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size >= SHARE_OF_FREE * free:
            log.info(
                "packed weights take %.1f GB, half or more of the %.1f GB free in %s: "
                "packed at each start",
                size / 1e9, free / 1e9, path.parent,
            )  # fmt: skip
            return
        lock = FileLock(path.with_name(f".{path.name}.lock"), "another process writes it")
    except (OSError, UsageError) as problem:
        told = explained(problem) if isinstance(problem, OSError) else problem
        log.info("packed weights are not kept, so they are packed at each start: %s", told)
        return
    try:
        with lock:
            if fingerprint(source) != made_of:
                log.info("%s changed while it was read: not kept", made_of.path)
                return
            _write(path, made_of, form, config, parts)
    except OSError as problem:
        told = explained(problem, where=path)
        log.info("packed weights are not kept, so they are packed at each start: %s", told)
    except UsageError as problem:
        log.debug("%s", problem)
    else:
        log.info("kept packed weights for the next start: %.1f GB, %s (%s)", size / 1e9, path, SEE)


def _write(path: Path, made_of: Fingerprint, form: Form, config: ModelConfig, parts: Parts) -> None:
    for left in path.parent.iterdir():
        if final_name(left) == path.name:  # by a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
    about = {
        "abi": ABI,
        "form": _told(form),
        "source": vars(made_of),
        "config": config.to_hf(),
        "made": time.time(),
    }
    with (
        byte_progress("keeping packed weights", num_bytes_of(parts)) as advance,
        atomic_write(path) as file,
    ):
        write_parts(file, parts, about, advance)


@dataclass(frozen=True)
class Kept:
    """A file of the cache; `problem` says why it will not be used, where that can be told without
    opening the model.
    """

    path: Path
    num_bytes: int
    header: dict[str, Any]
    problem: str | None

    @property
    def model(self) -> str | None:
        return self.header["source"]["path"] if self.header else None


def kept_files() -> list[Kept]:
    """All that is kept, by name; what another process removes meanwhile is not there."""
    if not folder().is_dir():
        return []
    found = map(_looked_at, sorted(folder().glob(f"*{ENDING}")))
    return [kept for kept in found if kept is not None]


def _looked_at(path: Path) -> Kept | None:
    header: dict[str, Any] = {}
    problem = None
    try:
        num_bytes = path.lstat().st_size
        header = read_header(path)
        if header["abi"] != ABI:
            problem = OTHER_VERSION
        elif not Path(header["source"]["path"]).exists():
            problem = "the model is gone"
        elif not _has_same_files(header):
            problem = CHANGED
    except UnfitError as unfit:
        problem = str(unfit)
    except FileNotFoundError:
        return None
    except OSError as unreadable:
        problem = f"it cannot be read: {unreadable.strerror}"
    return Kept(path, num_bytes, header, problem)


def _has_same_files(header: dict[str, Any]) -> bool:
    place = Path(header["source"]["path"])
    place = place if place.is_dir() else place.parent
    for name, size, changed in header["source"]["files"]:
        try:
            found = (place / name).stat()
        except OSError:
            return False
        if [found.st_size, found.st_mtime_ns] != [size, changed]:
            return False
    return True


def _files(source: TensorSource) -> list[Path]:
    if isinstance(source, GgufSource):
        return source.file.files
    return [source.path / name for name in sorted({e.file for e in source.entries.values()})]


def _samples(path: Path, size: int) -> Iterator[bytes]:
    """Pages at even distances, the first and the last among them."""
    with path.open("rb") as file:
        for number in range(SAMPLES):
            start = max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1)
            file.seek(start)
            yield file.read(SAMPLE_BYTES)
