"""Packed weights that are kept. Oracle: the model that was packed from its files."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from test_gguf import WIDE
from test_stored import checkpoint, needs_native
from torch import Tensor

import forked
from rorqual.errors import UsageError
from rorqual.files import cache_folder
from rorqual.locks import FileLock
from rorqual.model import DeepseekV3
from rorqual.model.stored import StoredStack
from rorqual.weights import load, packed_cache, packed_file
from rorqual.weights.packed_cache import kept_files
from rorqual.weights.stored_reader import _Reader

pytestmark = needs_native
LITTLE = oracle.CONFIGS["mtp_groups_yarn"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was told since it was last asked."""
    caplog.set_level("INFO", logger="rorqual.weights")

    def told() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "rorqual.weights"]
        caplog.clear()
        return found

    return told


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint("bfloat16", LITTLE, tmp_path)


def tensors_of(model: DeepseekV3) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def is_mapped(tensor: Tensor, path: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in place.split("-"))
        if start <= tensor.data_ptr() < stop:
            return name == str(path)
    return False


def not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model's files are read")

    monkeypatch.setattr(_Reader, "take", refuse)


CASES = [
    ("stored", "gguf:Q4_K_M", WIDE), ("stored", "fp8", LITTLE), ("native", "fp8", WIDE),
    ("int8", "bfloat16", WIDE), ("native", "float32", oracle.CONFIGS["tied_mtp"]),
    ("int8", "gguf:Q5_K_M", oracle.CONFIGS["no_q_lora"]), ("native", "bfloat16", LITTLE),
]  # fmt: skip


@pytest.mark.parametrize(("form", "source", "config"), CASES)
@torch.no_grad()
def test_the_next_start_maps_the_same_weights(
    form: Any, source: str, config: Any, tmp_path: Path, cache: Path,
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = checkpoint(source, config, tmp_path)
    first = load(path, form)
    (file,) = cache.iterdir()
    (told,) = (line for line in said() if "kept" in line)
    assert f"kept packed weights for the next start: 0.0 GB, {file}" in told
    assert "rorqual cache" in told
    not_read(monkeypatch)
    again = load(path, form)
    assert said() == []
    assert again.config == first.config
    before, after = tensors_of(first), tensors_of(again)
    assert before.keys() == after.keys()
    differ = [name for name, values in before.items() if not torch.equal(after[name], values)]
    assert not differ
    stacks = [part for part in again.modules() if isinstance(part, StoredStack)]
    for stack in stacks:
        held = stack.codes_EOB if stack.packed_EP is None else stack.packed_EP
        assert is_mapped(held, file), "no copy"
    old = [part for part in first.modules() if isinstance(part, StoredStack)]
    assert [s.kernels for s in stacks] == [s.kernels for s in old]
    assert [(s.kind, s.shape, s.block) for s in stacks] == [(s.kind, s.shape, s.block) for s in old]
    again.model.norm.weight.add_(0.0)  # type: ignore[union-attr]  # its own: it may be changed
    ids = torch.arange(11)[None]
    assert torch.equal(again(ids), first(ids))


def test_each_tensor_begins_a_page(model: Path, cache: Path) -> None:
    load(model, "native")
    (file,) = cache.iterdir()
    header = packed_file.read_header(file)
    offsets = [int(entry["offset"]) for entry in header["tensors"]]
    assert len(offsets) > 20
    assert all(offset % 4096 == 0 for offset in offsets)
    assert header["num_bytes"] == file.stat().st_size


def test_forms_lie_side_by_side(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {}
    for form in ("stored", "native", "int8"):
        load(model, form)  # type: ignore[arg-type]
    assert len(list(cache.iterdir())) == 3
    not_read(monkeypatch)
    for form in ("stored", "native", "int8"):
        linear = load(model, form).model.layers["0"].self_attn.kv_a_proj_with_mqa  # type: ignore[arg-type]
        kinds[form] = linear.stack.kind
    expected = "Q8_0" if LITTLE.hidden_size % 32 == 0 else "BF16"
    assert kinds == {"stored": "BF16", "native": "BF16", "int8": expected}


def test_kernels_that_pack_nothing_have_no_use_for_it(model: Path, cache: Path) -> None:
    load(model, "native", kernels="decoded")
    assert not cache.exists()
    packed = load(model, "native")
    plain = load(model, "native", kernels="decoded")
    stacks = [part for part in plain.modules() if isinstance(part, StoredStack)]
    assert all(stack.packed_EP is None for stack in stacks)
    ids = torch.arange(5)[None]
    assert not torch.equal(plain(ids), packed(ids))


def touch(path: Path) -> None:
    file = path / "model.safetensors"
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def other_values(path: Path) -> None:
    """Other weights of the same size and time: seen by a few pages."""
    file = path / "model.safetensors"
    found, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def other_shape(path: Path) -> None:
    config = path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (touch, "the model's files have changed"),
        (other_values, "the model has changed"),
        (other_shape, "the model has changed"),
    ],
)
def test_it_is_made_anew_for_a_changed_model(
    change: Callable[[Path], None], why: str, model: Path, cache: Path,
    said: Callable[[], list[str]],
) -> None:  # fmt: skip
    load(model, "native")
    (before,) = (file.read_bytes() for file in cache.iterdir())
    said()
    change(model)
    load(model, "native")
    anew, kept = said()
    assert anew == f"{model}: packed anew, since what was kept does not fit: {why}"
    assert kept.startswith("kept")
    (after,) = (file.read_bytes() for file in cache.iterdir())
    assert after != before
    load(model, "native")
    assert said() == []


def test_another_packed_form_is_not_taken_for_this_one(
    model: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from rorqual.weights import forms

    load(model, "native")
    said()
    monkeypatch.setattr(packed_cache, "ABI", packed_cache.ABI + 1)
    load(model, "native")
    assert "another version of rorqual packed it" in said()[0]
    load(model, "native")
    assert said() == []
    changed = replace(forms.FORMS["native"], keeps=("Q8_0",))
    monkeypatch.setitem(forms.FORMS, "native", changed)
    load(model, "native")
    assert "another version of rorqual packed it" in said()[0]


def cut(data: bytearray) -> None:
    del data[-1:]


def cut_short(data: bytearray) -> None:
    del data[10:]


def flip(place: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[place] ^= 1

    return change


def other_version(data: bytearray) -> None:
    data[8:12] = struct.pack("<I", 2)


def last_page(data: bytearray) -> None:
    data[-3] ^= 1


DAMAGE = {
    cut: "bytes instead of", cut_short: "it is cut off", flip(0): "no file of packed weights",
    other_version: "another version of rorqual wrote it", flip(13): "its header is damaged",
    flip(17): "its header is damaged", flip(100): "its header is damaged",
    last_page: "model.norm.weight is damaged",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_it_is_made_anew_where_it_is_damaged(
    damage: Callable[[bytearray], None], model: Path, cache: Path, said: Callable[[], list[str]]
) -> None:
    exact = load(model, "native")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    data = bytearray(whole)
    damage(data)
    file.write_bytes(data)
    said()
    found = load(model, "native")
    assert DAMAGE[damage] in said()[0]
    assert torch.equal(found(torch.arange(5)[None]), exact(torch.arange(5)[None]))
    assert file.stat().st_size == len(whole)
    load(model, "native")
    assert said() == []


def test_damage_between_the_first_and_last_page_is_found_by_reading(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "EDGE_BYTES", 64)
    load(model, "native")
    (file,) = cache.iterdir()
    header = packed_file.read_header(file)
    done: list[int] = []
    assert packed_file.broken(file, header, done.append) == []
    sizes = [torch.Size(e["shape"]).numel() for e in header["tensors"]]
    widths = [1 if e["role"] in ("packed", "codes") else 4 for e in header["tensors"]]
    assert sum(done) == sum(n * w for n, w in zip(sizes, widths, strict=True))
    entry = max(header["tensors"], key=lambda e: torch.Size(e["shape"]).numel())
    data = bytearray(file.read_bytes())
    data[int(entry["offset"]) + 70] ^= 1
    file.write_bytes(data)
    load(model, "native")
    assert packed_file.broken(file, packed_file.read_header(file), done.append) == [entry["name"]]


@pytest.mark.parametrize(("spare", "is_kept"), [(0, False), (1, True)])
def test_it_takes_less_than_half_of_what_is_free(
    spare: int, is_kept: bool, model: Path, cache: Path, said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = load(model, "native", kernels="native")
    for kept in kept_files():
        kept.path.unlink()
    said()
    stacks = {s for s in found.modules() if isinstance(s, StoredStack)}
    size = sum(b.nbytes for s in stacks for b in s.buffers())
    size += sum(p.nbytes for p in found.parameters())
    size += sum(b.nbytes for n, b in found.named_buffers() if n.endswith("correction_bias"))
    free = SimpleNamespace(free=2 * size + spare)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda place: free)
    load(model, "native")
    (told,) = said()
    assert bool(kept_files()) is is_kept
    if not is_kept:
        assert f"free in {cache}: packed at each start" in told


@pytest.mark.parametrize(("least", "is_kept"), [(0, True), (1, False)])
def test_what_is_little_is_not_kept(
    least: int, is_kept: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, "native")
    (kept,) = kept_files()
    size = sum(
        torch.Size(e["shape"]).numel() * (1 if e["role"] in ("packed", "codes") else 4)
        for e in kept.header["tensors"]
    )
    kept.path.unlink()
    monkeypatch.setattr(packed_cache, "MIN_BYTES", size + least)
    load(model, "native")
    assert bool(kept_files()) is is_kept


def test_a_cache_that_cannot_be_written_is_said(
    model: Path, cache: Path, said: Callable[[], list[str]]
) -> None:
    cache.parent.write_text("a file in its place")
    load(model, "native")
    (told,) = said()
    assert "packed weights are not kept, so they are packed at each start" in told
    assert str(cache) in told


def test_a_cache_that_can_only_be_read_is_read(
    model: Path, cache: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, "native")
    (file,) = cache.iterdir()
    file.chmod(0o444)
    cache.chmod(0o555)
    said()
    not_read(monkeypatch)
    try:
        load(model, "native")
    finally:
        cache.chmod(0o755)
    assert said() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_leaves_nothing_behind(
    number: int, model: Path, cache: Path, said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(file: Any, *_: object) -> None:
        file.write(b"some")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(packed_cache, "write_parts", refuse)
    found = load(model, "native")
    assert found(torch.arange(3)[None]).isfinite().all()
    (told,) = said()
    assert "packed weights are not kept" in told
    assert os.strerror(number) in told
    assert list(cache.iterdir()) == []


def test_a_model_that_changes_while_it_is_read_is_not_kept(
    model: Path, cache: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = _Reader.take

    def meanwhile(self: _Reader, tensor: Any) -> None:
        if tensor.name == "model.norm.weight":
            touch(model)
        take(self, tensor)

    monkeypatch.setattr(_Reader, "take", meanwhile)
    load(model, "native")
    assert "changed while it was read" in said()[0]
    assert list(cache.iterdir()) == []


PROGRAM = """
import sys
from rorqual.weights import load, packed_cache, packed_file

packed_cache.MIN_BYTES = 0
write = packed_file.write_parts

def held(file, *rest):
    file.write(b"some")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
    write(file, *rest)

packed_cache.write_parts = held
load(sys.argv[1], "native")
"""


def writer(model: Path, cache: Path) -> subprocess.Popen[str]:
    """A program that is writing, and goes on when it is told a line."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "RORQUAL_CACHE": str(cache.parent)}
    command = [sys.executable, "-c", PROGRAM, str(model)]
    process = forked.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.concurrency
def test_the_second_of_two_leaves_it_to_the_first(
    model: Path, cache: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = writer(model, cache)
    load(model, "native")
    assert said() == []
    assert kept_files() == [], "nobody reads what is half written"
    _, errors = first.communicate("go on\n")
    assert first.returncode == 0, errors
    assert len(list(cache.iterdir())) == 1, "neither lock nor temporary file stays"
    not_read(monkeypatch)
    load(model, "native")


@pytest.mark.concurrency
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_who_is_stopped_while_writing_leaves_no_half(
    number: int, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = writer(model, cache)
    process.send_signal(number)
    process.communicate()
    left = list(cache.iterdir())
    assert not kept_files()
    assert not left or number == signal.SIGKILL
    load(model, "native")
    (kept,) = kept_files()
    assert [file for file in cache.iterdir() if file != kept.path] == [], "what was left is gone"
    not_read(monkeypatch)
    load(model, "native")


def test_a_lock_that_is_held_costs_nothing(model: Path, cache: Path) -> None:
    load(model, "native")
    (kept,) = kept_files()
    kept.path.unlink()
    with FileLock(cache / f".{kept.path.name}.lock", "held"):
        load(model, "native")
    assert kept_files() == []


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
    model: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RORQUAL_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UsageError, match="RORQUAL_CACHE"):
        cache_folder()
    load(model, "native")
    (told,) = said()
    assert "packed at each start" in told
