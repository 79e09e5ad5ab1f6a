"""Packed weights, kept in the user's cache so that the next start only maps them.

One file a model and form. It fits as long as the model's files have the sizes and times, the shape
and a few pages in common with those that it was made of, and nobody else made or changed it; else
it is made anew, with a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import rorqual
from rorqual.errors import RorqualError, UsageError
from rorqual.files import atomic_write, cache_folder, explained, final_name
from rorqual.locks import FileLock, HeldError, is_held
from rorqual.log import logger
from rorqual.model import ModelConfig
from rorqual.ops.native import ABI
from rorqual.weights.forms import WIDER, Form
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.packed_file import (
    OTHER_VERSION,
    UnfitError,
    num_bytes_of,
    read_header,
    read_parts,
    unfit_where_odd,
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
CHANGED = "the model's files have changed"
LEFT = "left by a process that was stopped"

log = logger("weights")


@dataclass(frozen=True)
class Fingerprint:
    """Of a model's files: [name, bytes, times of change] of each, and a digest of names, shapes and
    types of the tensors, of the model's shape, and of a few pages of each file.
    """

    path: str
    files: list[list[Any]]
    digest: str


def fingerprint(source: TensorSource) -> Fingerprint:
    digest = hashlib.sha256(json.dumps(source.config.to_hf(), sort_keys=True).encode())
    for name, entry in sorted(source.entries.items()):
        kinds = source.kinds(name) if isinstance(source, GgufSource) else [entry.dtype]
        text = f"{name} {entry.file} {entry.shape} {kinds}\n"
        digest.update(text.encode(errors="surrogatepass"))
    files = []
    for path in _files(source):
        found = path.stat()
        files.append([path.name, found.st_size, *_times(found)])
        for sample in _samples(path, found.st_size):
            digest.update(sample)
    return Fingerprint(str(source.path.resolve()), files, digest.hexdigest())


def _times(found: os.stat_result) -> list[int]:
    """Of the last change. The second is the system's alone to set: who writes other values into a
    file can give it its old time, but not its old time of change.
    """
    return [found.st_mtime_ns, found.st_ctime_ns]


def folder() -> Path:
    """Where they are kept; UsageError for a user without a home."""
    return cache_folder() / "packed"


def file_of(path: str, form: str) -> Path:
    """The file of a model, by the resolved path of its checkpoint, in a form."""
    title = re.sub(r"[^\w.-]", "_", Path(path).name.removesuffix(".gguf"))[:60]
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return folder() / f"{title}-{digest}.{form}{ENDING}"


def find(made_of: Fingerprint, form: Form) -> tuple[ModelConfig, Parts] | None:
    """The parts that were kept; None, with a word where there are some that do not fit."""
    try:
        path = file_of(made_of.path, form.name)
        with path.open("rb") as file:
            header = _header(file)
            _check_fits(header, made_of, form)
            return _config(header, path), read_parts(file, header)
    except UnfitError as problem:
        log.info("%s: packed anew, since what was kept does not fit: %s", made_of.path, problem)
    except (UsageError, FileNotFoundError, NotADirectoryError):
        pass
    except OSError as problem:
        log.info("%s: packed weights that were kept cannot be read: %s", made_of.path, problem)
    return None


def _header(file: IO[bytes]) -> dict[str, Any]:
    """UnfitError where it is not what this version wrote for this user."""
    header = read_header(file)
    with unfit_where_odd():
        by, form, made = header["by"], header["form"], header["made"]
        path, files, _ = (header["source"][key] for key in ("path", "files", "digest"))
        texts = [path, form[0], *(name for name, *_ in files)]
        numbers = [made, *(number for _, *rest in files for number in rest)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name is no text")
        if not all(isinstance(number, int) for number in numbers) or not 0 <= made < 1 << 40:
            raise TypeError("a size or a time is no number")
    if by != _this_version():
        raise UnfitError(OTHER_VERSION)
    found = os.fstat(file.fileno())
    if hasattr(os, "geteuid"):
        if found.st_uid not in (os.geteuid(), 0):
            raise UnfitError("it belongs to another user")
        if found.st_mode & stat.S_IWOTH:
            raise UnfitError("every user may change it")
    if found.st_mtime_ns != made * 10**9:
        raise UnfitError("it was changed after it was written")
    return header


def _this_version() -> list[Any]:
    return [ABI, rorqual.__version__]


def _config(header: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_hf(header["config"], where=path)
    except RorqualError as problem:
        raise UnfitError(f"its configuration is not as rorqual writes it: {problem.what}") from None


def _check_fits(header: dict[str, Any], made_of: Fingerprint, form: Form) -> None:
    if header["form"] != _told(form):
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
        lock = FileLock(_lock_of(path), "another process writes it")
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
    except HeldError as problem:
        log.debug("%s", problem)
    except (OSError, UsageError) as problem:
        told = explained(problem, where=path) if isinstance(problem, OSError) else problem
        log.info("packed weights are not kept, so they are packed at each start: %s", told)
    else:
        log.info("kept packed weights for the next start: %.1f GB, %s (%s)", size / 1e9, path, SEE)


def _write(path: Path, made_of: Fingerprint, form: Form, config: ModelConfig, parts: Parts) -> None:
    for left in path.parent.iterdir():
        if final_name(left) == path.name:  # by a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
    made = int(time.time()) // 2 * 2  # whole seconds, and even: all file systems can keep it
    about = {
        "by": _this_version(),
        "form": _told(form),
        "source": vars(made_of),
        "config": config.to_hf(),
        "made": made,
    }
    with (
        byte_progress("keeping packed weights", num_bytes_of(parts)) as advance,
        atomic_write(path) as file,
    ):
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & ~0o022)
        write_parts(file, parts, about, advance)
        file.flush()
        os.utime(file.name, (made, made))  # whoever changes the file afterwards changes this too


@dataclass(frozen=True)
class Kept:
    """A file of the cache; `problem` says why it will not be used, where that can be told without
    opening the model. `is_busy`: another process is writing it.
    """

    path: Path
    num_bytes: int
    header: dict[str, Any]
    problem: str | None
    is_busy: bool = False

    @property
    def model(self) -> str | None:
        return self.header["source"]["path"] if self.header else None


def kept_files() -> list[Kept]:
    """All that is kept, by name, and what is left of writing some; what another process removes
    meanwhile is not there. OSError for a folder that cannot be read.
    """
    try:
        paths = sorted(folder().iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [_looked_at(path) for path in paths if path.suffix == ENDING]
    found += [
        _left(path, name) for path in paths if (name := final_name(path) or "").endswith(ENDING)
    ]
    return [kept for kept in found if kept is not None]


def _left(path: Path, name: str) -> Kept | None:
    """The beginning of a file, which whoever holds the lock is still writing."""
    try:
        num_bytes = path.lstat().st_size
    except FileNotFoundError:
        return None
    is_busy = is_held(_lock_of(path.with_name(name)))
    return Kept(path, num_bytes, {}, "being written" if is_busy else LEFT, is_busy)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _looked_at(path: Path) -> Kept | None:
    header: dict[str, Any] = {}
    problem = None
    try:
        num_bytes = path.lstat().st_size
        with path.open("rb") as file:
            header = _header(file)
        if not Path(header["source"]["path"]).exists():
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
    for name, *about in header["source"]["files"]:
        try:
            found = (place / name).stat()
        except (OSError, ValueError):
            return False
        if [found.st_size, *_times(found)] != about:
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
