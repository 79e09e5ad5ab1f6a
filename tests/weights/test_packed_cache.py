"""Packed weights that are kept. Oracle: the model that was packed from its files."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from test_gguf import WIDE
from test_stored import checkpoint, needs_native
from torch import Tensor

from rorqual.model import DeepseekV3
from rorqual.model.stored import StoredStack
from rorqual.weights import load, packed_cache, packed_file
from rorqual.weights.stored_parts import Parts

pytestmark = [needs_native, pytest.mark.usefixtures("cache")]
LITTLE = oracle.CONFIGS["mtp_groups_yarn"]


def tensors_of(model: DeepseekV3) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def is_mapped(tensor: Tensor, path: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in place.split("-"))
        if start <= tensor.data_ptr() < stop:
            return name == str(path)
    return False


CASES = [
    ("stored", "gguf:Q4_K_M", WIDE), ("stored", "fp8", LITTLE), ("native", "fp8", WIDE),
    ("int8", "bfloat16", WIDE), ("native", "float32", oracle.CONFIGS["tied_mtp"]),
    ("int8", "gguf:Q5_K_M", oracle.CONFIGS["no_q_lora"]), ("native", "bfloat16", LITTLE),
]  # fmt: skip


@pytest.mark.parametrize(("form", "source", "config"), CASES)
@torch.no_grad()
def test_the_next_start_maps_the_same_weights(
    form: Any, source: str, config: Any, tmp_path: Path, cache: Path,
    said: Callable[[], list[str]], not_read: Callable[[], None]
) -> None:  # fmt: skip
    path = checkpoint(source, config, tmp_path)
    first = load(path, form)
    (file,) = cache.iterdir()
    (told,) = (line for line in said() if "kept" in line)
    assert f"kept packed weights for the next start: 0.0 GB, {file}" in told
    assert "rorqual cache" in told
    not_read()
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


def test_each_tensor_begins_a_page(little: Path, cache: Path) -> None:
    load(little, "native")
    (file,) = cache.iterdir()
    header = packed_file.read_header(file)
    offsets = [int(entry["offset"]) for entry in header["tensors"]]
    assert len(offsets) > 20
    assert all(offset % 4096 == 0 for offset in offsets)
    assert header["num_bytes"] == file.stat().st_size


def test_forms_lie_side_by_side(little: Path, cache: Path, not_read: Callable[[], None]) -> None:
    kinds = {}
    for form in ("stored", "native", "int8"):
        load(little, form)  # type: ignore[arg-type]
    assert len(list(cache.iterdir())) == 3
    not_read()
    for form in ("stored", "native", "int8"):
        linear = load(little, form).model.layers["0"].self_attn.kv_a_proj_with_mqa  # type: ignore[arg-type]
        kinds[form] = linear.stack.kind
    expected = "Q8_0" if LITTLE.hidden_size % 32 == 0 else "BF16"
    assert kinds == {"stored": "BF16", "native": "BF16", "int8": expected}


def test_kernels_that_pack_nothing_have_no_use_for_it(little: Path, cache: Path) -> None:
    load(little, "native", kernels="decoded")
    assert not cache.exists()
    packed = load(little, "native")
    plain = load(little, "native", kernels="decoded")
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
    change: Callable[[Path], None], why: str, little: Path, cache: Path,
    said: Callable[[], list[str]],
) -> None:  # fmt: skip
    load(little, "native")
    (before,) = (file.read_bytes() for file in cache.iterdir())
    said()
    change(little)
    load(little, "native")
    anew, kept = said()
    assert anew == f"{little}: packed anew, since what was kept does not fit: {why}"
    assert kept.startswith("kept")
    (after,) = (file.read_bytes() for file in cache.iterdir())
    assert after != before
    load(little, "native")
    assert said() == []


def test_another_packed_form_is_not_taken_for_this_one(
    little: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from rorqual.weights import forms

    load(little, "native")
    said()
    monkeypatch.setattr(packed_cache, "ABI", packed_cache.ABI + 1)
    load(little, "native")
    assert "another version of rorqual packed it" in said()[0]
    load(little, "native")
    assert said() == []
    changed = replace(forms.FORMS["native"], keeps=("Q8_0",))
    monkeypatch.setitem(forms.FORMS, "native", changed)
    load(little, "native")
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
    damage: Callable[[bytearray], None], little: Path, cache: Path, said: Callable[[], list[str]]
) -> None:
    exact = load(little, "native")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    data = bytearray(whole)
    damage(data)
    file.write_bytes(data)
    said()
    found = load(little, "native")
    assert DAMAGE[damage] in said()[0]
    assert torch.equal(found(torch.arange(5)[None]), exact(torch.arange(5)[None]))
    assert file.stat().st_size == len(whole)
    load(little, "native")
    assert said() == []


def test_damage_between_the_first_and_last_page_is_found_by_reading(
    little: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checksum goes on from piece to piece, where it is written as where it is compared."""
    monkeypatch.setattr(packed_file, "EDGE_BYTES", 64)
    monkeypatch.setattr(packed_file, "WRITE_BYTES", 100)
    load(little, "native")
    (file,) = cache.iterdir()
    header = packed_file.read_header(file)
    done: list[int] = []
    assert packed_file.broken(file, header, done.append) == []
    whole = file.read_bytes()
    for entry in header["tensors"]:
        size = torch.Size(entry["shape"]).numel() * (
            1 if entry["role"] in ("packed", "codes") else 4
        )
        start = int(entry["offset"])
        assert entry["sum"] == f"{zlib.crc32(whole[start : start + size]):08x}"
    sizes = [torch.Size(e["shape"]).numel() for e in header["tensors"]]
    widths = [1 if e["role"] in ("packed", "codes") else 4 for e in header["tensors"]]
    assert sum(done) == sum(n * w for n, w in zip(sizes, widths, strict=True))
    entry = max(header["tensors"], key=lambda e: torch.Size(e["shape"]).numel())
    data = bytearray(file.read_bytes())
    data[int(entry["offset"]) + 70] ^= 1
    file.write_bytes(data)
    load(little, "native")
    assert packed_file.broken(file, packed_file.read_header(file), done.append) == [entry["name"]]


class _Recorded(io.BytesIO):
    """A file that remembers where it was written, and how much."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, int]] = []

    def write(self, data: Any) -> int:
        self.written.append((self.tell(), len(data)))
        return super().write(data)


def test_huge_pages_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the system keeps small ones, slower to read. Oracle: the bytes of the parts."""
    monkeypatch.setattr(packed_file, "HUGE_PAGE", 1 << 14)
    parts = Parts()
    parts.floats = {str(n): torch.randn(n) for n in (3, 10_000, 4096, 50_000)}
    file = _Recorded()
    packed_file.write_parts(file, parts, {}, lambda _: None)
    *pages, (last, _), header = file.written
    assert pages == [(k << 14, 1 << 14) for k in range(len(pages))]
    assert (last, header[0]) == (len(pages) << 14, 0)
    whole = file.getvalue()
    table = json.loads(whole[whole.index(b"{") : whole.index(b"\0", 24)])
    for entry in table["tensors"]:
        values = torch.frombuffer(
            whole, dtype=torch.float32, offset=int(entry["offset"]), count=entry["shape"][0]
        )
        assert torch.equal(values, parts.floats[entry["name"]])


WHOLE = (
    b'{"num_bytes": "4096", "abi": 0, "form": [], "config": {}, "stacks": {}, '
    b'"source": {"path": "", "files": [], "digest": ""}, '
)


@pytest.mark.parametrize(
    "header",
    [
        b"{", b"[" * 100_000, b"[]", b"{}", b'{"num_bytes": "x"}', b'{"num_bytes": "4096"}',
        WHOLE + b'"tensors": [{"name": "a", "role": "float", '
        b'"shape": [4], "offset": "99999", "edges": ""}]}',
        WHOLE + b'"tensors": [{"name": "a", "role": "float", '
        b'"shape": [1152921504606846976], "offset": "0", "edges": ""}]}',
    ],
    ids=lambda header: header[:40].decode(),
)  # fmt: skip
def test_a_header_of_another_program_is_unfit(header: bytes, tmp_path: Path) -> None:
    """Its checksum is right."""
    path = tmp_path / "a.packed"
    start = struct.pack("<8sIIQ", b"RQPACKED", 1, zlib.crc32(header), len(header))
    path.write_bytes((start + header).ljust(4096, b"\0"))
    with pytest.raises(packed_file.UnfitError, match="not as rorqual writes it"):
        packed_file.read_parts(path, packed_file.read_header(path))
