"""Uploaded files and batch outputs: bytes under generated ids, in a private directory.

A client's file name is kept as text and never becomes a path. Ids are made here and looked up in
memory, so a request's id never becomes a path either. Without `--files-dir` the directory is a
temporary one that goes with the server; with it, files of an earlier run are still there.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from rorqual.errors import RorqualError, UsageError
from rorqual.files import atomic_write, fsync_path, read_json, write_json
from rorqual.log import logger
from rorqual.serve.errors import ApiError
from rorqual.serve.schemas_batches import FileReply
from rorqual.serve.service import new_id
from rorqual.serve.settings import ServerSettings

log = logger("serve")

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
MAX_NAME_CHARACTERS = 200


class StoredFile(BaseModel):
    """What is written beside a file's bytes."""

    reply: FileReply
    owner: str


def prepare_folder(chosen: Path | None) -> None:
    """Makes the folder; UsageError if files could not be kept there, before a model is loaded."""
    try:
        folder = Path(tempfile.gettempdir()) if chosen is None else _open_folder(chosen)
    except FileNotFoundError as problem:  # no place for temporary files
        fix = "make room there, or name a folder with --files-dir"
        raise UsageError(f"uploads cannot be kept: {problem}", fix=fix) from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise _no_folder(folder, "this user may not write there")


def _open_folder(chosen: Path | None) -> Path:
    if chosen is None:
        return Path(tempfile.mkdtemp(prefix="rorqual-files-"))  # readable by this user only
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise _no_folder(chosen, str(problem)) from None
    return chosen


def _no_folder(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"cannot be the folder of files: {why}",
        where=folder,
        expected="a folder that this user may write to, or a name for a new one",
        fix="choose another --files-dir, or leave it out for a temporary folder",
    )


class FileStore:
    """Files by id; an owner sees only their own."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._is_private = settings.files_dir is None
        self._folder = _open_folder(settings.files_dir)
        self._files: dict[str, StoredFile] = {}
        self._num_reserved_bytes = 0
        if not self._is_private:
            self._load()

    def _load(self) -> None:
        for path in sorted(self._folder.glob("file-*.json")):
            try:
                stored = StoredFile.model_validate(read_json(path))
            except (RorqualError, ValidationError) as problem:
                log.warning("%s is left out: %s", path, problem)
                continue
            if FILE_ID.fullmatch(stored.reply.id) and self._path(stored.reply.id).is_file():
                self._files[stored.reply.id] = stored

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def num_bytes(self) -> int:
        return sum(file.reply.bytes for file in self._files.values()) + self._num_reserved_bytes

    async def add(
        self, chunks: Iterable[bytes], num_bytes: int, name: str, owner: str
    ) -> FileReply:
        """Keeps an upload; ApiError 413 or 429 when it is too large or there is no room."""
        settings = self._settings
        if num_bytes > settings.max_file_bytes:
            text = f"the file is longer than this server's limit of {settings.max_file_bytes} bytes"
            raise ApiError(413, text, code="file_too_large", param="file")
        is_full = self.num_bytes + num_bytes > settings.max_stored_bytes
        if is_full or len(self._files) >= settings.max_files:
            text = "there is no room for more files; delete some"
            raise ApiError(429, text, code="storage_full", headers={"retry-after": "60"})
        stored = _stored(name, num_bytes, "batch", owner)

        def write() -> None:
            with atomic_write(self._path(stored.reply.id)) as file:
                for chunk in chunks:
                    file.write(chunk)
            self._write_card(stored)

        self._num_reserved_bytes += num_bytes
        try:
            await asyncio.to_thread(write)
        finally:
            self._num_reserved_bytes -= num_bytes
        self._files[stored.reply.id] = stored
        return stored.reply

    async def adopt(self, part: Path, name: str, owner: str) -> FileReply:
        """Makes a file that a batch wrote in this folder one of ours, whatever its size."""
        num_bytes = part.stat().st_size
        stored = _stored(name, num_bytes, "batch_output", owner)

        def move() -> None:
            fsync_path(part)
            os.replace(part, self._path(stored.reply.id))
            self._write_card(stored)

        await asyncio.to_thread(move)
        self._files[stored.reply.id] = stored
        return stored.reply

    def _write_card(self, stored: StoredFile) -> None:
        write_json(self._folder / f"{stored.reply.id}.json", stored.model_dump())

    def all_of(self, owner: str) -> list[FileReply]:
        """The newest first."""
        own = [file.reply for file in reversed(self._files.values()) if file.owner == owner]
        return sorted(own, key=lambda reply: reply.created_at, reverse=True)

    def get(self, file_id: str, owner: str) -> FileReply:
        """ApiError 404 for an id that is not there or not the owner's."""
        stored = self._files.get(file_id)
        if stored is None or stored.owner != owner:
            raise ApiError(404, "there is no such file", code="file_not_found", param="file_id")
        return stored.reply

    def path_of(self, file_id: str, owner: str) -> Path:
        return self._path(self.get(file_id, owner).id)

    def lines(self, file_id: str, owner: str) -> Iterator[bytes]:
        with self.path_of(file_id, owner).open("rb") as file:
            yield from file

    async def delete(self, file_id: str, owner: str) -> None:
        reply = self.get(file_id, owner)
        del self._files[reply.id]

        def remove() -> None:
            (self._folder / f"{reply.id}.json").unlink(missing_ok=True)
            self._path(reply.id).unlink(missing_ok=True)

        await asyncio.to_thread(remove)

    def close(self) -> None:
        """Removes the temporary directory."""
        if self._is_private:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, file_id: str) -> Path:
        assert FILE_ID.fullmatch(file_id), "ids are made here"
        return self._folder / f"{file_id}.data"


def _stored(
    name: str, num_bytes: int, purpose: Literal["batch", "batch_output"], owner: str
) -> StoredFile:
    reply = FileReply(
        id=new_id("file-"),
        bytes=num_bytes,
        created_at=int(time.time()),
        filename=name[:MAX_NAME_CHARACTERS],
        purpose=purpose,
    )
    return StoredFile(reply=reply, owner=owner)
