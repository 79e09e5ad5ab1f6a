"""Interrupted conversions: killed, out of disk, refused. Oracle: the uninterrupted conversion."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hf_oracle as oracle
import pytest

import forked
from patience import HANG_SECONDS
from rorqual.errors import CheckpointError, UsageError
from rorqual.files import atomic_write
from rorqual.weights import load, save
from rorqual.weights.convert import files as convert_files
from rorqual.weights.convert import run as convert_module
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.record import LOCK, job_of, open_record
from rorqual.weights.convert.run import convert
from rorqual.weights.open import UNFINISHED, open_source
from small import lively

pytestmark = pytest.mark.concurrency

CONFIG = oracle.CONFIGS["mtp"]
SHARD = 60_000
# Converts with a progress that kills the process after so many pieces.
KILLED = """
import os, signal, sys
from contextlib import contextmanager
from rorqual.weights.convert.run import convert
from rorqual.weights.convert.plan import Options, Target
source, destination, to, left, shard = sys.argv[1:]
left = int(left)
@contextmanager
def progress(label, num_bytes):
    def advance(done):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance
options = Options(Target.parse(to), max_shard_bytes=float(shard) if shard else None)
convert(source, destination, options, workers=2, progress=progress)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    model = lively(CONFIG)
    save(model, folder, "fp8", max_shard_bytes=SHARD)
    (folder / "README.md").write_text("a card")
    return folder


def shard_bytes(to: str) -> int | None:
    """Small files; but a rank has one, whatever its size."""
    return None if to.startswith("shards") else SHARD


def options(to: str = "bf16") -> Options:
    return Options(Target.parse(to), max_shard_bytes=shard_bytes(to))


@pytest.mark.parametrize(
    ("to", "num_pieces"), [("bf16", 0), ("bf16", 40), ("bf16", 100), ("shards:2:bf16", 90)]
)
def test_killed_and_run_again(to: str, num_pieces: int, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", options(to))
    wanted = oracle.files_of(tmp_path / "whole")
    killed = tmp_path / "killed"
    limit = str(shard_bytes(to) or "")
    words = ("-c", KILLED, source, killed, to, num_pieces, limit)
    done = forked.run(*words, timeout=HANG_SECONDS)
    assert done.returncode == -9, done.stderr.decode()
    left = oracle.files_of(killed)
    assert UNFINISHED in left
    for name, data in left.items():
        if not name.startswith("."):
            assert data == wanted[name], f"{name} bears its final name and is not whole"
    with pytest.raises(CheckpointError, match="not finished"):
        load(killed)
    finished = {name: (killed / name).stat().st_mtime_ns for name in left if name in wanted}
    with atomic_write(killed / UNFINISHED) as file:  # as if killed while it wrote its record
        shutil.copy(file.name, file.name[:-12] + "0" * 12)
        file.write((killed / UNFINISHED).read_bytes())
    convert(source, killed, options(to))
    assert oracle.files_of(killed) == wanted
    for name, time in finished.items():
        assert (killed / name).stat().st_mtime_ns == time, f"{name} was written twice"


def test_another_conversion_does_not_go_on_in_its_place(source: Path, tmp_path: Path) -> None:
    words = ("-c", KILLED, source, tmp_path / "a", "bf16", 40, SHARD)
    forked.run(*words, timeout=HANG_SECONDS)
    before = oracle.files_of(tmp_path / "a")
    with pytest.raises(UsageError, match="another conversion was begun here"):
        convert(source, tmp_path / "a", options("float32"))
    assert oracle.files_of(tmp_path / "a") == before


@pytest.mark.parametrize("is_same_size", [True, False])
def test_a_source_that_was_written_again_makes_another_conversion(
    source: Path, tmp_path: Path, is_same_size: bool
) -> None:
    """Else a folder would be half of the one and half of the other."""
    shutil.copytree(source, tmp_path / "source")
    folder, file = tmp_path / "a", next((tmp_path / "source").glob("*.safetensors"))
    with open_source(tmp_path / "source") as opened:
        before = job_of(opened, to="bf16")
        for job in (before, job_of(opened, to="bf16")):  # the same goes on
            with open_record(folder, job):
                (folder / "model-00001-of-00002.safetensors").write_bytes(b"whole")
        stat = file.stat()
        if not is_same_size:
            with file.open("ab") as more:
                more.write(b" ")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9 * is_same_size))
        after = job_of(opened, to="bf16")
    with pytest.raises(UsageError, match="another conversion was begun here"):
        open_record(folder, after).__enter__()


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another conversion is writing"):
            convert(source, tmp_path / "a", options())
    convert(source, tmp_path / "a", options())
    assert LOCK not in oracle.files_of(tmp_path / "a")


def test_a_folder_that_is_not_ours_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(UsageError, match="not empty"):
        convert(source, tmp_path / "mine", options())
    assert oracle.files_of(tmp_path / "mine") == {"notes.txt": b"keep me"}
    with pytest.raises(UsageError, match="is a file"):
        convert(source, tmp_path / "mine/notes.txt", options())
    convert(source, tmp_path / "done", options())
    with pytest.raises(UsageError, match="not empty"):
        convert(source, tmp_path / "done", options())


def test_the_source_is_never_written(source: Path, tmp_path: Path) -> None:
    before = oracle.files_of(source)
    link = tmp_path / "link"
    link.symlink_to(source, target_is_directory=True)
    for destination in (source, source / "inside", source.parent, link):
        with pytest.raises(UsageError, match="the destination lies in the source"):
            convert(source, destination, options())
    assert oracle.files_of(source) == before


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of that size; skips visibly where we may not mount one."""
    path.mkdir()
    size = f"size={kilobytes}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command: the full disk is tested by a size limit alone")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_too_small_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200) as disk:
        with pytest.raises(CheckpointError, match="not enough room"):
            convert(source, disk / "out", options())
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole", options())
    monkeypatch.setattr(convert_module, "check_space", lambda folder, num_bytes: None)
    with small_disk(tmp_path / "disk", 400) as disk:
        with pytest.raises(CheckpointError, match="No space left on device") as problem:
            convert(source, disk / "out", options())
        assert "run the same command again" in str(problem.value)
        left = oracle.files_of(disk / "out")
        assert any(name.endswith(".safetensors") for name in left), "nothing was finished"
        assert not any(name.endswith(".part") for name in left)
        wanted = oracle.files_of(tmp_path / "whole")
        for name, data in left.items():
            assert name == UNFINISHED or data == wanted[name], name
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        convert(source, disk / "out", options())
        assert oracle.files_of(disk / "out") == wanted


def test_a_limit_on_the_size_of_files(source: Path, tmp_path: Path) -> None:
    """The other way to run out of room, and the same message; nothing stays behind."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            convert(source, tmp_path / "out", options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


def test_a_failing_sync_ends_the_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks report what they cannot write when they are asked to flush it."""

    def fail(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_files.FileInWork, "finish", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        convert(source, tmp_path / "out", options())
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    left = 60

    @contextmanager
    def progress(label: str, num_bytes: int) -> Iterator[object]:
        def advance(done: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "a", options(), progress=progress)  # type: ignore[arg-type]
    names = set(oracle.files_of(tmp_path / "a"))
    assert UNFINISHED in names
    assert not any(name.endswith(".part") for name in names)
    convert(source, tmp_path / "a", options())
    convert(source, tmp_path / "whole", options())
    assert oracle.files_of(tmp_path / "a") == oracle.files_of(tmp_path / "whole")
