"""Files of a conversion in work: several threads fill them by offset; whole ones take their names.

A file is written as `.NAME.part`, fsynced and renamed when its last tensor is there. Another thread
does that, so that the disk works while the next file is computed; at most two files are in work.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.files import BINARY, fsync_path
from rorqual.ops.device import num_processors
from rorqual.weights.convert.encode import encode
from rorqual.weights.convert.plan import Options, PlannedFile
from rorqual.weights.planned import PlannedTensor
from rorqual.weights.safetensors_file import as_bytes, write_at
from rorqual.weights.source import TensorSource

MAX_FILES_IN_WORK = 2
# The disk begins early on what is written; the fsync at the end then has little left to do.
SYNC_BYTES = 256_000_000
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Advance = Callable[[int], None]


class FileInWork:
    """A file that grows under a temporary name. `put` may be called from any thread."""

    def __init__(self, folder: Path, plan: PlannedFile) -> None:
        self.plan, self.layout = plan, plan.layout()
        self.path = folder / plan.name
        self.temporary = folder / f".{plan.name}.part"
        self._num_open = sum(1 for _ in plan.weights())
        self._lock = threading.Lock()
        self._descriptor = -1

    def open(self) -> None:
        """Creates the file at its full size, with its header; a second call does nothing."""
        with self._lock:
            if self._descriptor < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY
                self._descriptor = os.open(self.temporary, flags, 0o644)
                os.ftruncate(self._descriptor, self.layout.num_bytes)
                write_at(self._descriptor, memoryview(self.layout.header), 0)

    def put(self, tensor: PlannedTensor, first_row: int, rows: Tensor) -> None:
        row_bytes = tensor.num_bytes // tensor.shape[0] if tensor.shape[0] else 0
        is_alike = rows.nbytes == rows.shape[0] * row_bytes
        assert is_alike, f"{tensor.name}: rows of another width or dtype"
        offset = self.layout.offsets[tensor.name] + first_row * row_bytes
        write_at(self._descriptor, as_bytes(rows), offset)

    def count_down(self) -> bool:
        """After each tensor; true after the last."""
        with self._lock:
            self._num_open -= 1
            return self._num_open == 0

    def sync(self) -> None:
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def finish(self) -> None:
        """The file is whole: onto the disk, then under its name."""
        os.fsync(self._descriptor)
        self.close()
        os.replace(self.temporary, self.path)
        fsync_path(self.path.parent)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Writer:
    """Converts the tensors of files one after another, `workers` tensors at a time.

    `advance` is told the bytes written, `finished` the name of each file that is whole.
    """

    def __init__(
        self,
        source: TensorSource,
        options: Options,
        folder: Path,
        advance: Advance,
        finished: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.source, self.options, self.folder = source, options, folder
        self._advance, self._finished = advance, finished
        self._turn = threading.Condition()  # guards what follows
        self._num_finished = 0
        self._num_unsynced_bytes = 0
        self._has_stopped = False
        self._closing: list[Future[None]] = []

    def write(self, files: Sequence[PlannedFile], workers: int) -> None:
        """Returns when every file has its name. On an error, or Ctrl-C, the rest is given up."""
        opened = [FileInWork(self.folder, plan) for plan in files]
        with (
            ThreadPoolExecutor(1, "sync") as closer,
            ThreadPoolExecutor(workers, "convert") as pool,
        ):
            tasks = [
                pool.submit(self._convert, index, file, tensor, scale, closer)
                for index, file in enumerate(opened)
                for tensor, scale in file.plan.weights()
            ]
            try:
                for task in as_completed(tasks):
                    task.result()
                for closing in self._closing:
                    closing.result()
            except BaseException:
                self._stop()
                pool.shutdown(wait=True, cancel_futures=True)
                closer.shutdown(wait=True, cancel_futures=True)
                for file in opened:
                    file.close()
                raise

    def _convert(
        self,
        index: int,
        file: FileInWork,
        tensor: PlannedTensor,
        scale: PlannedTensor | None,
        closer: ThreadPoolExecutor,
    ) -> None:
        self._wait_for_turn(index)

        def put(planned: PlannedTensor, first_row: int, rows: Tensor) -> None:
            if self._has_stopped:
                raise _StoppedError
            file.put(planned, first_row, rows)
            if self._is_sync_due(rows.nbytes):
                self._closing.append(closer.submit(file.sync))

        try:
            if not self._has_stopped:
                file.open()
                encode(self.source, tensor, scale, self.options, put)
        except _StoppedError:
            return
        if not self._has_stopped and file.count_down():
            self._closing.append(closer.submit(self._finish, file))

    def _wait_for_turn(self, index: int) -> None:
        """Tasks come in the order of files: the earlier ones never wait for the later."""
        with self._turn:
            self._turn.wait_for(
                lambda: self._has_stopped or index < self._num_finished + MAX_FILES_IN_WORK
            )

    def _is_sync_due(self, num_bytes: int) -> bool:
        with self._turn:
            self._advance(num_bytes)
            self._num_unsynced_bytes += num_bytes
            is_due = self._num_unsynced_bytes >= SYNC_BYTES
            if is_due:
                self._num_unsynced_bytes = 0
            return is_due

    def _finish(self, file: FileInWork) -> None:
        if self._has_stopped:
            return
        try:
            file.finish()
            self._finished(file.plan.name)
        except BaseException:
            self._stop()  # those who wait for their turn would wait for ever
            raise
        with self._turn:
            self._num_finished += 1
            self._turn.notify_all()

    def _stop(self) -> None:
        with self._turn:
            self._has_stopped = True
            self._turn.notify_all()


class _StoppedError(Exception):
    """Another thread has failed, or the user has had enough."""


def default_workers() -> int:
    """One a core that we may use, up to eight: beyond, the disk is the limit."""
    return min(num_processors(), 8)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Our threads are the parallelism; torch's own would only compete with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def disk_full_explained(folder: Path, num_bytes: int) -> Iterator[None]:
    """A full disk, or a quota, as an error that says what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in DISK_FULL:
            raise
        raise _disk_full(folder, num_bytes, str(problem.strerror)) from None


def check_space(folder: Path, num_bytes: int) -> None:
    """CheckpointError before anything is written if the disk has less than that."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if shutil.disk_usage(existing).free < num_bytes:
        raise _disk_full(existing, num_bytes, "the disk has not enough room")


def _disk_full(folder: Path, num_bytes: int, what: str) -> CheckpointError:
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return CheckpointError(
        f"{what}: the conversion needs {num_bytes:,} bytes more than are written",
        where=folder,
        found=f"{free:,} bytes free",
        expected=f"{num_bytes:,} bytes",
        fix="make room, or choose another disk; run the same command again, and it goes on "
        "after the files that are finished",
    )
