"""The folder that a conversion writes into: what it began, what is finished, what may be resumed.

A record lies in the folder until the last file is there. Shards take their names only when they are
whole and on the disk, so an interrupted conversion (Ctrl-C, kill -9, a full disk) loses the shards
in work and no others, and the same command goes on from there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import CheckpointError, UsageError
from rorqual.files import (
    atomic_write,
    final_name,
    fsync_path,
    read_json,
    stand_in,
    write_json,
)
from rorqual.locks import FileLock
from rorqual.weights.open import UNFINISHED
from rorqual.weights.source import TensorSource

LOCK = ".rorqual-convert.lock"
BUSY = "another conversion is writing here"
_WEIGHTS = re.compile(
    r".*\.(safetensors|gguf|bin|pt|pth|ckpt|h5|msgpack|onnx|part)|config\.json|model_args\.json"
    r"|model\.safetensors\.index\.json|\..*"
)


@dataclass
class Record:
    """An open destination. `finished` maps the shards that are whole to their size."""

    folder: Path
    job: dict[str, Any]
    finished: dict[str, int]
    is_new_folder: bool

    def add(self, name: str) -> None:
        self.finished[name] = (self.folder / name).stat().st_size
        self.write()

    def write(self) -> None:
        write_json(self.folder / UNFINISHED, {"job": self.job, "finished": self.finished})

    def is_finished(self, name: str, num_bytes: int) -> bool:
        """By the record, or by a name that was given just before the end."""
        file = self.folder / name
        return file.is_file() and file.stat().st_size == num_bytes

    def close(self) -> None:
        """The conversion is complete: the record goes last."""
        fsync_path(self.folder)
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def abandon(self) -> None:
        """After an error: removes what is in work, and a folder in which nothing is finished."""
        remove_files_in_work(self.folder)
        with suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
            names = {path.name for path in self.folder.iterdir()} - {UNFINISHED}
            if not names:
                (self.folder / UNFINISHED).unlink(missing_ok=True)
                if self.is_new_folder:
                    self.folder.rmdir()


def remove_files_in_work(folder: Path) -> None:
    for path in folder.iterdir():
        if final_name(path) is not None or (path.name[0], path.suffix) == (".", ".part"):
            path.unlink(missing_ok=True)


def check_places(source: Path, destination: Path) -> None:
    """UsageError if the conversion would write over, into or around its source."""
    ours, theirs = destination.resolve(), source.resolve()
    is_same = ours == theirs or (ours.exists() and ours.samefile(theirs))
    if is_same or theirs in ours.parents or ours in theirs.parents:
        raise UsageError(
            "the destination lies in the source, or the source in it",
            where=destination,
            found=f"source {source}",
            fix="choose a folder elsewhere; nothing was written",
        )


@contextmanager
def open_record(folder: Path, job: dict[str, Any]) -> Iterator[Record]:
    """Takes a new or empty folder, or one that this very job began; UsageError for any other."""
    if folder.exists() and not folder.is_dir():
        raise UsageError("is a file; a folder is needed", where=folder)
    is_new = not folder.exists()
    if not is_new:
        _finished_before(folder, job)  # nothing is written where something else lies
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK, BUSY, where=folder):
        # Another conversion may have ended between the look and the lock.
        record = Record(folder, job, _finished_before(folder, job), is_new)
        try:
            remove_files_in_work(folder)
            record.write()
            yield record
        except BaseException:
            record.abandon()
            raise


def _finished_before(folder: Path, job: dict[str, Any]) -> dict[str, int]:
    """What this job has finished in a folder; UsageError if it holds anything else."""
    paths = list(folder.iterdir())
    # A run that was killed at its first record left that one only, in work.
    names = {path.name for path in paths if final_name(path) != UNFINISHED}
    has_record = UNFINISHED in names
    if names - {LOCK} and not has_record:
        raise UsageError(
            "already exists and is not empty",
            where=folder,
            fix="choose another folder or remove this one; nothing was written",
        )
    if not has_record:
        return {}
    table = read_json(folder / UNFINISHED, CheckpointError)
    _compare_jobs(folder, table.get("job"), job)
    return dict(table.get("finished", {}))


def job_of(source: TensorSource, **options: Any) -> dict[str, Any]:
    """What makes two runs the same conversion: the source's files, and what was asked for."""
    import rorqual

    path = source.path
    files = sorted({entry.file for entry in source.entries.values()})
    stats = {name: (path / name if path.is_dir() else path).stat() for name in files}
    job = {
        "rorqual": rorqual.__version__,
        **options,
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    same: dict[str, Any] = json.loads(json.dumps(job))
    return same


def _compare_jobs(folder: Path, found: Any, wanted: dict[str, Any]) -> None:
    if found == wanted:
        return
    found = found if isinstance(found, dict) else {}
    other = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
    raise UsageError(
        "another conversion was begun here",
        where=folder,
        found=", ".join(f"{key} {str(found.get(key))[:60]}" for key in other),
        expected=", ".join(f"{key} {str(wanted.get(key))[:60]}" for key in other),
        fix="finish it with its own command, remove the folder, or choose another",
    )


def side_files(source: TensorSource) -> list[Path]:
    """Files beside the weights that belong to the model: tokenizer, generation defaults, licence.

    Files of the folder itself; weights in any format, hidden files and subfolders are left.
    CheckpointError for a link to nothing: what it stands for cannot be copied.
    """
    path = source.path
    if not path.is_dir():
        return []
    files = [file for file in path.iterdir() if not _WEIGHTS.fullmatch(file.name)]
    for file in files:
        if not file.exists() and (link := stand_in(file)) is not None:
            raise CheckpointError(link.what, where=file, fix=link.fix)
    return sorted(file for file in files if file.is_file())


def copy_side_files(source: TensorSource, folder: Path) -> list[str]:
    """Copies them, whole or not at all."""
    copied = []
    for file in side_files(source):
        with file.open("rb") as read, atomic_write(folder / file.name) as written:
            shutil.copyfileobj(read, written)
        copied.append(file.name)
    return copied
