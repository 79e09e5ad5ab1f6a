"""Conversions to GGUF that are interrupted: killed, out of disk, two at once, in bounded memory.

Oracle: the undisturbed conversion, byte for byte.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
from test_convert_resume import small_disk

import forked
from patience import HANG_SECONDS
from rorqual.errors import CheckpointError, UsageError
from rorqual.model import ModelConfig
from rorqual.weights import load, save
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.gguf import job as gguf_job
from rorqual.weights.gguf import writer as gguf_writer
from rorqual.weights.gguf.file import SPLIT_NAME
from small import lively

pytestmark = pytest.mark.concurrency

CONFIG = oracle.WIDE.with_changes(vocab_size=320)
MIX = "gguf:Q4_K_M"
PART_BYTES = 300_000
LATE = 36  # pieces, of about 50
# What the interpreter and torch take before anything is converted differs from machine to machine,
# so the bound is on what comes on top: a few pieces of 8 MB a worker, the journal, the pool.
MAX_GROWTH_BYTES = 300e6

# Kills itself at the n-th call of a function, in a conversion with a journal after every tensor.
KILLED = """
import os, signal, sys
from pathlib import Path
from rorqual.weights.gguf import container as gguf_container
from rorqual.weights.gguf import writer as gguf_writer
from rorqual.weights.convert.run import convert
from rorqual.weights.convert.plan import Options, Target
source, destination, to, part_bytes, place, left = sys.argv[1:]
left = int(left)
gguf_container.JOURNAL_BYTES = 1
owner, name = {
    "piece": (gguf_writer, "encode_blocks"),
    "name": (gguf_container.os, "replace"),
    "journal": (gguf_container.os, "replace"),
    "forget": (gguf_container.GgufWriter, "forget"),
}[place]
before = getattr(owner, name)
def fatal(*arguments, **options):
    global left
    ending = {"name": ".gguf", "journal": ".gguf.partial.json"}.get(place)
    if ending is None or str(arguments[1]).endswith(ending):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return before(*arguments, **options)
setattr(owner, name, fatal)
options = Options(Target.parse(to), max_shard_bytes=float(part_bytes) if part_bytes else None)
convert(source, destination, options, workers=2)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf_resume") / "source"
    model = lively(CONFIG)
    save(model, folder, "fp8")
    return folder


def options(part_bytes: int | None = None) -> Options:
    return Options(Target.parse(MIX), max_shard_bytes=part_bytes)


def kill(source: Path, destination: Path, place: str, left: int, part_bytes: int | None) -> None:
    words = ("-c", KILLED, source, destination, MIX, part_bytes or "", place, left)
    done = forked.run(*words, timeout=HANG_SECONDS)
    assert done.returncode == -9, done.stderr.decode()


@pytest.mark.parametrize("part_bytes", [None, PART_BYTES])
@pytest.mark.parametrize(("place", "left"), [("piece", 0), ("piece", 25), ("name", 0)])
def test_killed_and_run_again(
    source: Path, tmp_path: Path, place: str, left: int, part_bytes: int | None
) -> None:
    before = oracle.files_of(source)
    convert(source, tmp_path / "whole/m.gguf", options(part_bytes))
    wanted = oracle.files_of(tmp_path / "whole")
    assert len(wanted) == 1 if part_bytes is None else len(wanted) > 3
    folder = tmp_path / "killed"
    kill(source, folder / "m.gguf", place, left, part_bytes)
    left_over = oracle.files_of(folder)
    assert left_over, "nothing was begun"
    assert all(name.startswith(".") for name in left_over), "a name was given too early"
    convert(source, folder / "m.gguf", options(part_bytes))
    assert oracle.files_of(folder) == wanted
    assert oracle.files_of(source) == before
    load(next(iter(sorted(folder.iterdir()))))


@pytest.mark.parametrize(("place", "left"), [("name", 2), ("forget", 0), ("forget", 2)])
def test_killed_while_the_parts_take_their_names(
    source: Path, tmp_path: Path, place: str, left: int
) -> None:
    """Whole parts that bear their names are not made again."""
    convert(source, tmp_path / "whole/m.gguf", options(PART_BYTES))
    wanted = oracle.files_of(tmp_path / "whole")
    folder = tmp_path / "killed"
    kill(source, folder / "m.gguf", place, left, PART_BYTES)
    named = [name for name in oracle.files_of(folder) if SPLIT_NAME.fullmatch(name)]
    assert len(named) == (left if place == "name" else len(wanted))
    times = {name: (folder / name).stat().st_mtime_ns for name in named}
    done = convert(source, folder / "m.gguf", options(PART_BYTES))
    assert oracle.files_of(folder) == wanted
    assert done.files == sorted(wanted)
    for name, time in times.items():
        assert (folder / name).stat().st_mtime_ns == time, f"{name} was written twice"
    with pytest.raises(UsageError, match="already exists"):
        convert(source, folder / "m.gguf", options(PART_BYTES))


def test_what_was_finished_is_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, num_pieces = gguf_writer.encode_blocks, 0

    def counted(*arguments: Any) -> Any:
        nonlocal num_pieces
        num_pieces += 1
        return encode(*arguments)

    monkeypatch.setattr(gguf_writer, "encode_blocks", counted)
    convert(source, tmp_path / "whole.gguf", options())
    num_whole, num_pieces = num_pieces, 0
    kill(source, tmp_path / "m.gguf", "piece", LATE, None)
    convert(source, tmp_path / "m.gguf", options())
    assert 0 < num_pieces < num_whole - LATE / 2


def test_leftovers_of_other_runs_are_removed(source: Path, tmp_path: Path) -> None:
    """Temporaries of a killed run in other parts, and nothing else."""
    ours = [
        ".m-00001-of-00099.gguf.partial",
        ".m-00001-of-00099.gguf.partial.json",
        ".m.gguf.partial",
    ]
    others = [".m.gguf.part", ".n.gguf.partial", "m.gguf.partial", ".m-00001-of-00099.gguf"]
    for name in ours + others:
        (tmp_path / name).write_text("a leftover")
    convert(source, tmp_path / "m.gguf", options())
    assert sorted(oracle.files_of(tmp_path)) == sorted([*others, "m.gguf"])


@pytest.mark.parametrize("part_bytes", [None, PART_BYTES])
def test_a_journal_that_was_being_written_is_removed(
    source: Path, tmp_path: Path, part_bytes: int | None
) -> None:
    """Under the name that it really has: the run is killed before the journal takes its own."""
    convert(source, tmp_path / "whole/m.gguf", options(part_bytes))
    kill(source, tmp_path / "killed/m.gguf", "journal", 3, part_bytes)
    in_work = [name for name in oracle.files_of(tmp_path / "killed") if name.startswith("..m")]
    assert in_work, "no journal was in work"
    convert(source, tmp_path / "killed/m.gguf", options(part_bytes))
    assert oracle.files_of(tmp_path / "killed") == oracle.files_of(tmp_path / "whole")


def test_a_folder_killed_at_its_very_first_write_is_taken(source: Path, tmp_path: Path) -> None:
    """The record's own temporary file, left by a kill, does not make a folder somebody else's."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "..rorqual-convert.json.0123456789ab").write_text("{")
    convert(source, folder, Options(Target.parse("bf16")))
    convert(source, tmp_path / "whole", Options(Target.parse("bf16")))
    assert oracle.files_of(folder) == oracle.files_of(tmp_path / "whole")


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".m.gguf.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another conversion is writing"):
            convert(source, tmp_path / "m.gguf", options())
    convert(source, tmp_path / "m.gguf", options())
    assert sorted(oracle.files_of(tmp_path)) == ["m.gguf"]


def test_existing_files_are_never_replaced(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "other/m.gguf", options(PART_BYTES))
    part = sorted(oracle.files_of(tmp_path / "other"))[1]
    shutil.rmtree(tmp_path / "other")
    for name, size in (("m.gguf", None), (part, PART_BYTES)):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="already exists"):
            convert(source, tmp_path / "m.gguf", options(size))
        assert oracle.files_of(tmp_path) == {name: b"mine"}
        (tmp_path / name).unlink()


def test_a_disk_that_is_too_small_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200) as disk:
        with pytest.raises(CheckpointError, match="not enough room"):
            convert(source, disk / "new/m.gguf", options())
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("part_bytes", [None, PART_BYTES])
def test_a_disk_that_fills_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int | None
) -> None:
    before = oracle.files_of(source)
    convert(source, tmp_path / "whole/m.gguf", options(part_bytes))
    wanted = oracle.files_of(tmp_path / "whole")
    with small_disk(tmp_path / "disk", 800) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(gguf_job, "check_space", lambda folder, num_bytes: None)
            with pytest.raises(CheckpointError, match="No space left on device") as problem:
                convert(source, disk / "m.gguf", options(part_bytes))
        assert "run the same command again" in str(problem.value)
        assert all(name.startswith(".") for name in oracle.files_of(disk))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        convert(source, disk / "m.gguf", options(part_bytes))
        assert oracle.files_of(disk) == wanted
    assert oracle.files_of(source) == before


def test_what_is_written_already_needs_no_room(source: Path, tmp_path: Path) -> None:
    """A disk with room for the rest of a half-written file is large enough."""
    convert(source, tmp_path / "whole.gguf", options())
    size = (tmp_path / "whole.gguf").stat().st_size
    with small_disk(tmp_path / "disk", size // 1024 + 64) as disk:
        kill(source, disk / "m.gguf", "piece", LATE, None)
        convert(source, disk / "m.gguf", options())
        assert (disk / "m.gguf").stat().st_size == size


def test_a_limit_on_the_size_of_files(source: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            convert(source, tmp_path / "m.gguf", options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(name.startswith(".") for name in oracle.files_of(tmp_path))
    convert(source, tmp_path / "m.gguf", options())
    assert sorted(oracle.files_of(tmp_path)) == ["m.gguf"]


# Peak memory before and after the conversion, from the kernel.
MEASURED = """
import sys
from pathlib import Path
from rorqual.weights.convert.run import convert
from rorqual.weights.convert.plan import Options, Target
import rorqual.weights.gguf.writer, rorqual.tokenizer
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
convert(sys.argv[1], sys.argv[2], Options(Target.parse(sys.argv[3])), workers=2)
print(peak() - before, peak())
"""


def growth(source: Path, destination: Path, to: str = MIX) -> tuple[int, int]:
    """Bytes by which a conversion raised the process's peak memory, and that peak."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(destination), to],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_SECONDS,
    )
    grown, peak = done.stdout.split()
    return int(grown), int(peak)


def zeros(folder: Path, config: ModelConfig) -> int:
    """An FP8 checkpoint whose weights take no disk: a file with holes. Returns its bytes."""
    from rorqual.files import write_json
    from rorqual.weights.fp8 import QUANTISATION
    from rorqual.weights.planned import planned_tensors
    from rorqual.weights.safetensors_file import lay_out

    folder.mkdir()
    layout = lay_out(planned_tensors(config, "fp8"))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.num_bytes)
    write_json(folder / "config.json", config.to_hf() | {"quantization_config": QUANTISATION})
    return layout.num_bytes


def wide(num_experts: int) -> ModelConfig:
    return CONFIG.with_changes(
        hidden_size=1024, moe_intermediate_size=1536, n_routed_experts=num_experts
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: peak memory unknown")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A stack of experts is larger than the bound, and is never held whole."""
    config = wide(72)
    num_bytes = zeros(tmp_path / "source", config)
    assert num_bytes > MAX_GROWTH_BYTES
    grown, _ = growth(tmp_path / "source", tmp_path / "m.gguf", "gguf:BF16")
    assert grown < MAX_GROWTH_BYTES / 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: peak memory unknown")
def test_memory_of_a_gigabyte(tmp_path: Path) -> None:
    num_bytes = zeros(tmp_path / "source", wide(220))
    assert num_bytes > 1e9
    grown, peak = growth(tmp_path / "source", tmp_path / "m.gguf")
    print(f"{num_bytes:,} bytes of FP8: peak {peak:,}, {grown:,} of them for the conversion")
    assert grown < MAX_GROWTH_BYTES
