"""A GGUF file or its parts in work: one run at a time, what earlier runs left, names at the end.

Everything in work has a hidden name that begins with the destination's, so that the next run for
the same destination finds what it can continue and removes the rest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from rorqual.errors import UsageError
from rorqual.files import final_name
from rorqual.locks import FileLock
from rorqual.weights.convert.files import check_space, disk_full_explained
from rorqual.weights.convert.record import BUSY
from rorqual.weights.gguf.container import GgufWriter
from rorqual.weights.safetensors_file import as_bytes
from rorqual.weights.source import TensorSource


def part_names(destination: Path, num_parts: int) -> list[Path]:
    """The one file, or `NAME-00001-of-00003.gguf` and so on."""
    if num_parts == 1:
        return [destination]
    stem = destination.name.removesuffix(".gguf")
    return [
        destination.with_name(f"{stem}-{number:05}-of-{num_parts:05}.gguf")
        for number in range(1, num_parts + 1)
    ]


@contextmanager
def files_in_work(
    destination: Path, writers: Sequence[GgufWriter], *, replace: bool
) -> Iterator[list[GgufWriter]]:
    """Takes the destination, yields the writers that have something to write, and gives the files
    their names when the block was left well.

    UsageError if another run writes there, or without `replace` if a file has its name already;
    CheckpointError if the disk is or becomes too small. What can be continued is kept.
    """
    folder = destination.parent
    is_new_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = destination.with_name(f".{destination.name}.lock")
    try:
        with FileLock(lock, BUSY, where=destination):
            left = _begin(destination, writers, replace)
            needed = sum(writer.num_bytes_left for writer in left)
            check_space(folder, needed)
            with disk_full_explained(folder, needed):
                yield left
                for writer in left:  # no part has its name before all are whole
                    writer.publish()
                for writer in writers:
                    writer.forget()
    except BaseException:
        if is_new_folder:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def _begin(destination: Path, writers: Sequence[GgufWriter], replace: bool) -> list[GgufWriter]:
    """Refuses files that are not ours to replace, and removes what cannot be continued.

    Returns the writers that are not done: a run may have been killed while it gave the names, or
    when all were given and it had begun to forget.
    """
    named = [writer for writer in writers if writer.path.exists()]
    is_ours = any(writer.is_published for writer in writers)
    if is_ours and len(named) == len(writers) and not any(w.partial.exists() for w in writers):
        return []
    if named and not is_ours and not replace:
        raise UsageError(
            "already exists",
            where=named[0].path,
            fix="choose another name; nothing was written",
        )
    keep = set()
    for writer in writers:
        if writer.is_published or writer.num_bytes_left < writer.num_bytes:
            keep |= {writer.partial.name, writer.journal.name}
    for path in leftovers(destination):
        if path.name not in keep:
            path.unlink(missing_ok=True)
    return [writer for writer in writers if not writer.is_published]


def leftovers(destination: Path) -> list[Path]:
    """Hidden files that runs for this destination have left, whole or in parts; of a journal also
    its next version, still under the name that `files.py` gave it while it was written.
    """
    stem = re.escape(destination.name.removesuffix(".gguf"))
    name = rf"({re.escape(destination.name)}|{stem}-\d{{5}}-of-\d{{5}}\.gguf)"
    pattern = re.compile(rf"\.{name}\.partial(\.json)?")
    return [
        path
        for path in destination.parent.iterdir()
        if pattern.fullmatch(final_name(path) or path.name)
    ]


def fingerprint_of(source: TensorSource, mix: str, importance: Mapping[str, Tensor]) -> str:
    """What a continued file must have been made from: the source's files, and what was asked."""
    folder = source.path if source.path.is_dir() else source.path.parent
    facts = [str(folder.resolve()), mix]
    for name in sorted({entry.file for entry in source.entries.values()}):
        status = (folder / name).stat()
        facts.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    digest = hashlib.sha256()
    for name, weights in sorted(importance.items()):
        digest.update(f"{name} {list(weights.shape)}".encode())
        digest.update(as_bytes(weights.float().contiguous()))
    return "\n".join([*facts, digest.hexdigest()])
