"""Reads and writes at an offset, with the system's calls for it and, as on Windows, without.

Oracle: slices of the bytes in memory. Threads use one descriptor, so that a place that another
thread moved would show.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from rorqual.files import BINARY, read_at, write_at
from rorqual.ops import ceilings

NUM_BYTES, PIECE, NUM_THREADS = 400_000, 1_000, 8
WITHOUT = ("preadv", "pread", "pwrite", "pwritev", "sysconf", "O_BINARY")


@pytest.fixture(params=["with the system's calls", "without"])
def _calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        for name in WITHOUT:
            monkeypatch.delattr(os, name, raising=False)


@pytest.mark.usefixtures("_calls")
def test_many_threads_share_a_descriptor(tmp_path: Path) -> None:
    wanted = bytes(os.urandom(NUM_BYTES))
    path = tmp_path / "data"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | BINARY)
    found = bytearray(NUM_BYTES)

    def write(start: int) -> int:
        return write_at(descriptor, memoryview(wanted)[start : start + PIECE], start)

    def read(start: int) -> int:
        return read_at(descriptor, memoryview(found)[start : start + PIECE], start)

    starts = list(reversed(range(0, NUM_BYTES, PIECE)))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert set(pool.map(write, starts)) == {PIECE}
        assert set(pool.map(read, starts)) == {PIECE}
    assert path.read_bytes() == wanted
    assert found == wanted
    rest = bytearray(PIECE)
    assert read_at(descriptor, memoryview(rest), NUM_BYTES - 10) == 10
    assert rest[:10] == wanted[-10:]
    assert read_at(descriptor, memoryview(rest), NUM_BYTES) == 0
    os.close(descriptor)


def test_physical_memory_is_told_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' call is stood in for; its structure begins with its size, then the load, then the
    total (MEMORYSTATUSEX of sysinfoapi.h)."""

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 6),
        ]

    def fill(address: object) -> int:
        status = ctypes.cast(address, ctypes.POINTER(Status)).contents  # type: ignore[arg-type]
        assert status.length == ctypes.sizeof(Status)
        status.load, status.total = 50, 3 << 20
        return 1

    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.delattr(os, "sysconf")
    assert ceilings.total_memory_bytes() == 3 << 20
