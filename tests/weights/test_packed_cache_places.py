"""Where packed weights are kept, on which disks, and beside which other processes.

Oracle: what the folder holds, and that the next start reads none of the model's files.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_packed_cache import touch
from test_stored import needs_native

import forked
from rorqual.errors import UsageError
from rorqual.files import cache_folder
from rorqual.locks import FileLock
from rorqual.model.stored import StoredStack
from rorqual.weights import load, packed_cache
from rorqual.weights.packed_cache import kept_files
from rorqual.weights.stored_reader import _Reader

pytestmark = [needs_native, pytest.mark.usefixtures("cache")]


@pytest.mark.parametrize(("spare", "is_kept"), [(0, False), (1, True)])
def test_it_takes_less_than_half_of_what_is_free(
    spare: int, is_kept: bool, little: Path, cache: Path, said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = load(little, "native", kernels="native")
    for kept in kept_files():
        kept.path.unlink()
    said()
    stacks = {s for s in found.modules() if isinstance(s, StoredStack)}
    size = sum(b.nbytes for s in stacks for b in s.buffers())
    size += sum(p.nbytes for p in found.parameters())
    size += sum(b.nbytes for n, b in found.named_buffers() if n.endswith("correction_bias"))
    free = SimpleNamespace(free=2 * size + spare)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda place: free)
    load(little, "native")
    (told,) = said()
    assert bool(kept_files()) is is_kept
    if not is_kept:
        assert f"free in {cache}: packed at each start" in told


@pytest.mark.parametrize(("least", "is_kept"), [(0, True), (1, False)])
def test_what_is_little_is_not_kept(
    least: int, is_kept: bool, little: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(little, "native")
    (kept,) = kept_files()
    size = sum(
        torch.Size(e["shape"]).numel() * (1 if e["role"] in ("packed", "codes") else 4)
        for e in kept.header["tensors"]
    )
    kept.path.unlink()
    monkeypatch.setattr(packed_cache, "MIN_BYTES", size + least)
    load(little, "native")
    assert bool(kept_files()) is is_kept


def test_a_cache_that_cannot_be_written_is_said(
    little: Path, cache: Path, said: Callable[[], list[str]]
) -> None:
    cache.parent.write_text("a file in its place")
    load(little, "native")
    (told,) = said()
    assert "packed weights are not kept, so they are packed at each start" in told
    assert str(cache) in told


def test_a_cache_that_can_only_be_read_is_read(
    little: Path, cache: Path, said: Callable[[], list[str]], not_read: Callable[[], None]
) -> None:
    load(little, "native")
    (file,) = cache.iterdir()
    file.chmod(0o444)
    cache.chmod(0o555)
    said()
    not_read()
    try:
        load(little, "native")
    finally:
        cache.chmod(0o755)
    assert said() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_leaves_nothing_behind(
    number: int, little: Path, cache: Path, said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(file: Any, *_: object) -> None:
        file.write(b"some")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(packed_cache, "write_parts", refuse)
    found = load(little, "native")
    assert found(torch.arange(3)[None]).isfinite().all()
    (told,) = said()
    assert "packed weights are not kept" in told
    assert os.strerror(number) in told
    assert list(cache.iterdir()) == []


def test_a_model_that_changes_while_it_is_read_is_not_kept(
    little: Path, cache: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = _Reader.take

    def meanwhile(self: _Reader, tensor: Any) -> None:
        if tensor.name == "model.norm.weight":
            touch(little)
        take(self, tensor)

    monkeypatch.setattr(_Reader, "take", meanwhile)
    load(little, "native")
    assert "changed while it was read" in said()[0]
    assert list(cache.iterdir()) == []


PROGRAM = """
import sys
import torch
from rorqual.weights import load, packed_cache
from rorqual.weights.stored_reader import _Reader

path, place = sys.argv[1:]
packed_cache.MIN_BYTES = 0
owner, name = {"packing": (_Reader, "take"), "writing": (packed_cache, "write_parts")}[place]
go_on = getattr(owner, name)

def held(first, *rest):
    setattr(owner, name, go_on)
    if place == "writing":
        first.write(b"some")
        first.flush()
    print(place, flush=True)
    sys.stdin.readline()
    go_on(first, *rest)

setattr(owner, name, held)
print(load(path, "native")(torch.arange(11)[None]).sum().item())
"""


def starting(little: Path, cache: Path, place: str) -> subprocess.Popen[str]:
    """A program that is packing or writing, and goes on when it is told a line."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "RORQUAL_CACHE": str(cache.parent)}
    command = [sys.executable, "-c", PROGRAM, str(little), place]
    process = forked.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{place}\n"
    return process


@pytest.mark.concurrency
def test_the_second_of_two_leaves_it_to_the_first(
    little: Path, cache: Path, said: Callable[[], list[str]], not_read: Callable[[], None]
) -> None:
    first = starting(little, cache, "writing")
    load(little, "native")
    assert said() == []
    assert [kept.is_busy for kept in kept_files()] == [True], "nobody reads what is half written"
    _, errors = first.communicate("go on\n")
    assert first.returncode == 0, errors
    assert len(list(cache.iterdir())) == 1, "neither lock nor temporary file stays"
    not_read()
    load(little, "native")


@pytest.mark.concurrency
def test_two_that_pack_at_once_both_answer_and_keep_it_once(
    little: Path, cache: Path, not_read: Callable[[], None]
) -> None:
    both = [starting(little, cache, "packing") for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.flush()
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len(list(cache.iterdir())) == 1, "neither lock nor temporary file stays"
    not_read()
    found = load(little, "native")(torch.arange(11)[None]).sum().item()
    assert [float(out) for out, _ in told] == [found, found]


@pytest.mark.concurrency
@pytest.mark.parametrize("place", ["packing", "writing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_who_is_stopped_leaves_no_half(
    number: int, place: str, little: Path, cache: Path, not_read: Callable[[], None]
) -> None:
    process = starting(little, cache, place)
    process.send_signal(number)
    process.communicate()
    assert process.returncode
    left = list(cache.iterdir()) if place == "writing" else []
    assert not any(kept.header for kept in kept_files())
    assert not left or number == signal.SIGKILL
    load(little, "native")
    (kept,) = kept_files()
    assert [file for file in cache.iterdir() if file != kept.path] == [], "what was left is gone"
    not_read()
    load(little, "native")


def test_what_others_are_writing_stays(little: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    half = cache / ".another-0123456789ab.native.packed.0123456789ab"
    half.write_bytes(b"some")
    load(little, "native")
    assert {kept.path for kept in kept_files()} == set(cache.iterdir())
    assert half.exists()


def test_a_lock_that_is_held_costs_nothing(little: Path, cache: Path) -> None:
    load(little, "native")
    (kept,) = kept_files()
    kept.path.unlink()
    with FileLock(cache / f".{kept.path.name}.lock", "held"):
        load(little, "native")
    assert kept_files() == []


def test_a_system_without_huge_pages_maps_it_too(
    little: Path, not_read: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    load(little, "native")
    not_read()
    monkeypatch.setattr(mmap, "mmap", Plain)
    load(little, "native")


def test_what_cannot_be_read_hides_nothing_else(little: Path, cache: Path) -> None:
    """And what is removed while it is listed is not there."""
    load(little, "native")
    (kept,) = kept_files()
    (cache / "a.native.packed").mkdir()
    (cache / "z.native.packed").symlink_to(cache / "nowhere")
    other, same = kept_files()
    assert other.problem == "it cannot be read: Is a directory"
    assert same == kept


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RORQUAL_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("RORQUAL_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "rorqual"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "home" / ".cache" / "rorqual"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "home" / "Library" / "Caches" / "rorqual"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "rorqual"


def test_a_user_without_a_home_packs_at_each_start(
    little: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RORQUAL_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UsageError, match="RORQUAL_CACHE"):
        cache_folder()
    load(little, "native")
    (told,) = said()
    assert "packed at each start" in told
