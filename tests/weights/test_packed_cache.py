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

import rorqual
from rorqual.model import DeepseekV3
from rorqual.model.stored import StoredStack
from rorqual.weights import load, packed_cache, packed_file
from rorqual.weights.packed_cache import kept_files
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
    header = header_of(file)
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


def header_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return packed_file.read_header(opened)


def broken(file: Path, advance: Callable[[int], None]) -> list[str]:
    with file.open("rb") as opened:
        return packed_file.broken(opened, packed_file.read_header(opened), advance)


def write_as_before(file: Path, data: bytes) -> None:
    """Other bytes with the old time, as a failing disk leaves them."""
    found = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def touch(path: Path) -> None:
    file = path / "model.safetensors"
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def other_values(path: Path) -> None:
    """Other weights of the same size and time."""
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    write_as_before(file, data)


def other_shape(path: Path) -> None:
    config = path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (touch, "the model's files have changed"),
        (other_values, "the model's files have changed"),
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


def test_other_values_are_seen_by_a_few_pages_too(
    little: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system keeps no time of change of its own."""
    monkeypatch.setattr(packed_cache, "_times", lambda found: [found.st_mtime_ns])
    load(little, "native")
    said()
    other_values(little)
    load(little, "native")
    assert "the model has changed" in said()[0]


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
    monkeypatch.setattr(rorqual, "__version__", "0.0.1", raising=False)
    load(little, "native")
    assert "another version of rorqual packed it" in said()[0]
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
    data[8:12] = struct.pack("<I", 1)


def last_page(data: bytearray) -> None:
    data[-3] ^= 1


DAMAGE = {
    cut: "bytes instead of", cut_short: "it is cut off", flip(0): "no file of packed weights",
    other_version: "another version of rorqual packed it", flip(13): "its header is damaged",
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
    write_as_before(file, data)
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
    header = header_of(file)
    done: list[int] = []
    assert broken(file, done.append) == []
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
    write_as_before(file, data)
    load(little, "native")
    assert broken(file, done.append) == [entry["name"]]


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


ABOUT: dict[str, Any] = {
    "num_bytes": "4096", "by": [], "form": ["native"], "config": {}, "made": 0, "stacks": {},
    "tensors": [], "source": {"path": "", "files": [], "digest": ""},
}  # fmt: skip
FLOAT = {"name": "a", "role": "float", "shape": [4], "offset": "0", "edges": ""}


def with_header(path: Path, header: bytes) -> Path:
    """A file whose checksum of the header is right."""
    start = struct.pack("<8sIIQ", b"RQPACKED", packed_file.VERSION, zlib.crc32(header), len(header))
    path.write_bytes((start + header).ljust(4096, b"\0"))
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{", b"[" * 100_000, b"[]", b"{}", b'{"num_bytes": "x"}', b'{"num_bytes": "4096"}',
        *(
            json.dumps(ABOUT | {"tensors": [FLOAT | changed]}).encode()
            for changed in (
                {"offset": "99999"}, {"offset": "-4096"}, {"shape": [1 << 60]}, {"shape": [-2, -2]},
                {"shape": [1.5]}, {"shape": 4}, {"shape": [0]}, {"role": []}, {"offset": None},
            )
        ),
        json.dumps(ABOUT | {"tensors": 7}).encode(),
        json.dumps(ABOUT | {"stacks": {"a": {"kind": "Q8_0", "shape": 3, "block": [1]}}}).encode(),
    ],
    ids=lambda header: header[-70:].decode(),
)  # fmt: skip
def test_a_header_of_another_program_is_unfit(header: bytes, tmp_path: Path) -> None:
    path = with_header(tmp_path / "a.packed", header)
    told = r"not as rorqual writes it|damaged"
    with pytest.raises(packed_file.UnfitError, match=told), path.open("rb") as file:
        packed_file.read_parts(file, packed_file.read_header(file))


@pytest.mark.parametrize(
    "changed",
    [
        {"form": []}, {"form": 7}, {"form": [7]}, {"made": "today"}, {"made": 1 << 70},
        {"made": -1}, {"source": {}}, {"source": {"path": 7, "files": [], "digest": ""}},
        {"source": {"path": "", "files": [[]], "digest": ""}},
        {"source": {"path": "", "files": [["a", "b"]], "digest": ""}},
        {"source": {"path": "", "files": 7, "digest": ""}}, {"by": None},
    ],
)  # fmt: skip
def test_what_another_program_put_there_is_listed_as_unfit(
    changed: dict[str, Any], cache: Path
) -> None:
    cache.mkdir(parents=True)
    with_header(cache / "a.native.packed", json.dumps(ABOUT | changed).encode())
    (kept,) = kept_files()
    assert kept.header == {}
    assert kept.problem is not None
    assert "not as rorqual writes it" in kept.problem or "another version" in kept.problem


def test_a_configuration_of_another_version_is_unfit(
    little: Path, cache: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version between two releases may have written it."""
    exact = load(little, "native")
    (file,) = cache.iterdir()
    to_hf = type(exact.config).to_hf
    odd = lambda self: to_hf(self) | {"hidden_size": "large"}  # noqa: E731
    file.unlink()
    with monkeypatch.context() as earlier:
        earlier.setattr(type(exact.config), "to_hf", odd)
        load(little, "native")
    said()
    monkeypatch.setattr(packed_cache, "_check_fits", lambda *_: None)
    found = load(little, "native")
    assert "configuration" in said()[0]
    assert torch.equal(found(torch.arange(5)[None]), exact(torch.arange(5)[None]))
