"""Checksums of a checkpoint's files: a damaged one is seen before it is trained on.

`trainer/checksums.json` gives size and SHA-256 of the files that a run goes on from. What a user
may change, the advice beside the weights (`chat.json`, `generation_config.json`), is not among
them. A checkpoint without the list, of an earlier version, is taken as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rorqual.errors import TrainingError
from rorqual.files import read_json, write_json
from rorqual.runs import TRAINER
from rorqual.weights.advice import CHAT_CARD, GENERATION

CHECKSUMS = "checksums.json"
SMALL_BYTES = 1 << 20


def checksum(file: Path) -> dict[str, Any]:
    """Size and digest as `write_checksums` takes them."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def write_checksums(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Of the files in `folder` but the advice; those of `known`, by their path in it, are not read
    again.
    """
    known, own = known or {}, folder / TRAINER / CHECKSUMS
    apart = {own, folder / GENERATION, folder / CHAT_CARD}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in apart)
    names = [path.relative_to(folder).as_posix() for path in files]
    table = {name: known.get(name) or checksum(folder / name) for name in names}
    write_json(own, {"files": table})


def damage(folder: Path, *, is_deep: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with which file, a line each; nothing where all is as it was written.

    Without `is_deep` of large files the size alone counts. `share` (rank, world) leaves large files
    to the other ranks.
    """
    place = folder / TRAINER / CHECKSUMS
    if not place.is_file():
        return []
    try:
        table = read_json(place, TrainingError)["files"]
        wanted = {str(name): (int(of["bytes"]), str(of["sha256"])) for name, of in table.items()}
    except (TrainingError, LookupError, TypeError, ValueError, AttributeError):
        return [f"{TRAINER}/{CHECKSUMS} is no list of checksums"]
    rank, world = share
    faults: list[str] = []
    for number, (name, (size, digest)) in enumerate(sorted(wanted.items())):
        is_read = size <= SMALL_BYTES or (is_deep and number % world == rank)
        faults += _faults(folder / name, name, size, digest if is_read else None)
    return faults


def _faults(file: Path, name: str, size: int, digest: str | None) -> Iterable[str]:
    try:
        found = file.stat().st_size
        if found != size:
            yield f"{name} has {found:,} bytes instead of {size:,}"
        elif digest is not None and checksum(file)["sha256"] != digest:
            yield f"{name} is not what was written (SHA-256)"
    except OSError as problem:
        yield f"{name} cannot be read: {problem.strerror or problem}"
