"""The machinery under a conversion: limits of disks and threads, files in work, the record of what
is finished. Oracles: figures by hand; the uninterrupted conversion.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file

from rorqual.errors import CheckpointError, UsageError
from rorqual.weights import save
from rorqual.weights.convert import files as convert_files
from rorqual.weights.convert import run as convert_module
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.record import LOCK, Record, open_record, side_files
from rorqual.weights.convert.run import convert
from rorqual.weights.open import UNFINISHED, kind_of, open_source
from small import lively

CONFIG = oracle.CONFIGS["mtp"]
SHARD = 60_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "source"
    model = lively(CONFIG)
    save(model, folder, "bfloat16", max_shard_bytes=SHARD)
    (folder / "README.md").write_text("a card")
    return folder


def options(to: str = "bf16", **more: Any) -> Options:
    return Options(Target.parse(to), **({"max_shard_bytes": SHARD} | more))


def sizes_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize(("num_cores", "workers"), [(1, 1), (7, 7), (8, 8), (9, 8), (64, 8)])
def test_a_worker_a_core_up_to_eight(
    num_cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)), raising=False)
    assert convert_files.default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # Windows and macOS have none
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    assert convert_files.default_workers() == workers
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert convert_files.default_workers() == 1


def test_room_for_the_last_byte_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    convert_files.check_space(tmp_path / "a" / "b", 1000)
    with pytest.raises(CheckpointError, match="not enough room") as caught:
        convert_files.check_space(tmp_path / "a" / "b", 1001)
    assert set(asked) == {tmp_path}  # the nearest folder that exists is on that disk
    assert (caught.value.found, caught.value.expected) == ("1,000 bytes free", "1,001 bytes")


def test_only_a_full_disk_is_explained_as_one(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with (
            pytest.raises(CheckpointError, match="7 bytes more than are written") as caught,
            convert_files.disk_full_explained(tmp_path, 7),
        ):
            raise OSError(number, os.strerror(number))
        assert os.strerror(number) in str(caught.value)
    with (
        pytest.raises(PermissionError, match="not yours"),
        convert_files.disk_full_explained(tmp_path, 7),
    ):
        raise PermissionError(errno.EACCES, "not yours")


def test_threads_of_torch_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with suppress(KeyboardInterrupt), convert_files.one_thread_each():
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_two_files_in_work_at_once_and_the_disk_kept_busy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pieces are flushed while others are computed; a file is flushed before it has its name,
    and its folder after. Every byte is told to the progress once.
    """
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    in_work, flushed, named, told = [0], [], [], [0]
    sync, finish = convert_files.FileInWork.sync, convert_files.FileInWork.finish
    fsync, replace, fsync_path = os.fsync, os.replace, convert_files.fsync_path

    def counted(file: convert_files.FileInWork) -> None:
        flushed.append(file.path.name)
        sync(file)

    def look(file: convert_files.FileInWork) -> None:
        in_work.append(len([*tmp_path.glob("out/.*.safetensors.part")]))
        inode, place = file.temporary.stat().st_ino, len(named)
        finish(file)
        assert f"flush {inode}" in named[place : named.index("name", place)]

    def log_fsync(descriptor: int) -> None:
        named.append(f"flush {os.fstat(descriptor).st_ino}")
        fsync(descriptor)

    def log_replace(old: Path, new: Path) -> None:
        if str(new).endswith(".safetensors"):
            named.append("name")
        replace(old, new)

    @contextmanager
    def progress(label: str, num_bytes: int) -> Iterator[Any]:
        told.append(num_bytes)

        def advance(done: int) -> None:
            told[0] += done

        yield advance

    monkeypatch.setattr(convert_files.FileInWork, "sync", counted)
    monkeypatch.setattr(convert_files.FileInWork, "finish", look)
    monkeypatch.setattr(convert_files, "SYNC_BYTES", 20_000)
    monkeypatch.setattr(convert_files.os, "fsync", log_fsync)
    monkeypatch.setattr(convert_files.os, "replace", log_replace)
    monkeypatch.setattr(
        convert_files, "fsync_path", lambda path: named.append("folder") or fsync_path(path)
    )
    done = convert(source, tmp_path / "out", options(), workers=4, progress=progress)
    assert 1 <= max(in_work) <= 2
    num_bytes = sum(t.nbytes for f in done.files for t in load_file(tmp_path / "out" / f).values())
    assert told == [num_bytes, num_bytes]
    # As often as the limit was reached and no oftener: a piece is at most 16 kB here.
    assert num_bytes / 36_000 <= len(flushed) <= num_bytes / 20_000
    for place in [i for i, what in enumerate(named) if what == "name"]:
        assert "folder" in named[place + 1 :]
    assert named.count("name") == named.count("folder") == len(done.files)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_nothing_stays_open_after_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the system does not list open files")

    def fail(file: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(convert_files.FileInWork, "finish", fail)
    with pytest.raises(OSError, match="broken disk"):
        convert(source, tmp_path / "out", options(), workers=2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "out").exists()


def test_the_figures_of_a_conversion_that_goes_on(source: Path, tmp_path: Path) -> None:
    """The last shard is cut short: it is made again, and no other."""
    whole = convert(source, tmp_path / "whole", options(), workers=1)
    sizes = sizes_of(tmp_path / "whole")
    shards = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    assert whole.files == sorted(shards)
    assert whole.num_bytes == whole.num_bytes_written == sum(shards.values())
    assert whole.notes == []
    assert 0 < whole.seconds < 600
    folder, last = tmp_path / "again", whole.files[-1]
    with suppress(KeyboardInterrupt), open_source(source) as opened:
        job = convert_module.job_of(
            opened, to="huggingface bf16 1", keep_mtp=True, scale_format=None, max_shard_bytes=SHARD
        )
        with open_record(folder, job):
            for name in whole.files:
                shutil.copy(tmp_path / "whole" / name, folder / name)
            os.truncate(folder / last, shards[last] - 1)
            raise KeyboardInterrupt
    needed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "check_space", lambda at, size: needed.append(size))
        again = convert(source, folder, options(), workers=1)
    assert sizes_of(folder) == sizes
    assert again.num_bytes == whole.num_bytes
    assert again.num_bytes_written == shards[last]
    assert again.notes == [f"{len(shards) - 1} of {len(shards)} files were finished before"]
    beside = sum(sizes[path.name] for path in side_files(open_source(source)))
    assert needed == [shards[last] + beside]
    assert beside >= len("a card")


@pytest.mark.parametrize(
    "other",
    [
        options("float32"),
        options("shards:2:bf16", max_shard_bytes=None),
        options(keep_mtp=False),
        options("fp8", scale_format="ue8m0"),
        options(max_shard_bytes=SHARD + 1),
    ],
)
def test_what_was_asked_for_makes_another_conversion(
    other: Options, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(convert_module, "_write_settings", stop)
        convert(source, tmp_path / "out", options())
    with pytest.raises(UsageError, match="another conversion was begun here"):
        convert(source, tmp_path / "out", other)
    convert(source, tmp_path / "out", options())


def test_an_abandoned_folder_goes_only_if_it_was_made_here(tmp_path: Path) -> None:
    def abandon(folder: Path, content: str | None) -> None:
        with suppress(KeyboardInterrupt), open_record(folder, {"to": "x"}):
            (folder / ".a.safetensors.part").write_text("half")
            if content is not None:
                (folder / content).write_text("whole")
            raise KeyboardInterrupt

    abandon(tmp_path / "new", None)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    abandon(tmp_path / "old", None)
    assert list((tmp_path / "old").iterdir()) == []
    abandon(tmp_path / "new", "a.safetensors")
    assert set(sizes_of(tmp_path / "new")) == {UNFINISHED, "a.safetensors"}
    with open_record(tmp_path / "new", {"to": "x"}) as record:
        assert (tmp_path / "new" / LOCK).exists()
        assert record.is_finished("a.safetensors", 5)
        assert not record.is_finished("a.safetensors", 6)
        assert not record.is_finished("b.safetensors", 5)
        record.add("a.safetensors")
        record.close()
    assert record.finished == {"a.safetensors": 5}
    assert set(sizes_of(tmp_path / "new")) == {"a.safetensors"}


def test_the_record_notes_the_sizes_of_what_is_whole(tmp_path: Path) -> None:
    record = Record(tmp_path, {"to": "x"}, {}, is_new_folder=False)
    (tmp_path / "a").write_text("12345")
    record.add("a")
    assert json.loads((tmp_path / UNFINISHED).read_text()) == {
        "job": {"to": "x"},
        "finished": {"a": 5},
    }


def test_files_of_other_weights_are_no_side_files(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "a")
    beside = set(sizes_of(source)) - {p.name for p in source.glob("model*")} - {"config.json"}
    assert "README.md" in beside
    for name in (
        "a.safetensors", "a.gguf", "a.bin", "a.pt", "a.pth", "a.ckpt", "a.h5", "a.msgpack",
        "a.onnx", "a.part", "model_args.json", ".hidden",
    ):  # fmt: skip
        (tmp_path / "a" / name).write_text("x")
    (tmp_path / "a" / "folder").mkdir()
    (tmp_path / "a" / "my_config.json").write_text("{}")
    with open_source(source) as opened:
        opened.path = tmp_path / "a"
        found = side_files(opened)
    assert found == sorted(found)
    assert {file.name for file in found} == beside | {"my_config.json"}


def test_a_folder_that_is_not_finished_is_no_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out", options())
    (tmp_path / "out" / UNFINISHED).write_text("{}")
    with pytest.raises(CheckpointError, match="is not finished") as caught:
        kind_of(tmp_path / "out")
    assert "again" in str(caught.value.fix)

    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        kind_of(source)
    assert str(caught.value.where) == str(source)
    assert str(source) in str(caught.value.fix)
