"""Edges of what a GGUF file may hold, and of what we write into one: the last value that is fine
and the first that is not. Oracles: docs/gguf.md, numbers by hand, the `gguf` package.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_gguf_format import crafted, key, tensor_entry, text

from rorqual.errors import CheckpointError, UsageError
from rorqual.weights.checks import check_gguf
from rorqual.weights.gguf import container as gguf_container
from rorqual.weights.gguf import format as gguf_format
from rorqual.weights.gguf import job as gguf_job
from rorqual.weights.gguf import summary as gguf_summary
from rorqual.weights.gguf import writer as gguf_writer
from rorqual.weights.gguf.container import GgufWriter, Short, header_of
from rorqual.weights.gguf.file import GgufFile, gguf_files, read_gguf
from rorqual.weights.gguf.format import read_header
from rorqual.weights.gguf.mixes import MIXES, type_of
from rorqual.weights.planned import PlannedTensor

F32 = "F32"


def written(path: Path, keys: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """Float32 tensors under names with `__` for a dot."""
    plan = {
        PlannedTensor(name.replace("__", "."), F32, tuple(values.shape)): values
        for name, values in tensors.items()
    }
    with GgufWriter(path, keys, list(plan)) as writer:
        for planned, values in plan.items():
            writer.write(planned, [values.contiguous().view(torch.uint8)])
    return path


def refused(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_header(path)


def alignment(size: int) -> bytes:
    return key("general.alignment", 4, struct.pack("<I", size))


def test_the_last_sizes_that_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(crafted(tensors=[tensor_entry("a" * 255, [1, 1, 1, 1])], version=2))
    header = read_header(path)
    assert (header.version, header.alignment) == (2, 32)
    assert header.tensors["a" * 255].shape == (1, 1, 1, 1)
    refused(path, crafted(tensors=[tensor_entry("a" * 256, [1])]), "at most 255")
    for size in (8, 1 << 20):
        path.write_bytes(crafted([alignment(size)], data=1 << 20))
        assert read_header(path).alignment == size
    for size in (4, 1 << 21, 48):
        refused(path, crafted([alignment(size)], data=1 << 22), "power of two from 8 to 1048576")
    # The data ends with the file: 4 values of 4 bytes in 16, and not in 15.
    whole = crafted(tensors=[tensor_entry("a", [4])], data=16)
    path.write_bytes(whole)
    assert read_header(path).tensors["a"].offset == len(whole) - 16
    refused(path, whole[:-1], "tensors inside the file")
    path.write_bytes(crafted(data=0)[:24])
    assert read_header(path).tensors == {}
    refused(path, crafted(data=0)[:23], "less than the shortest header")


def test_names_that_are_taken_for_paths(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(crafted(tensors=[tensor_entry("blk.0-a_b:c~!", [4])]))
    assert list(read_header(path).tensors) == ["blk.0-a_b:c~!"]
    for name in (".a", "a..b", "a b", "a/b", "\x7f"):
        refused(path, crafted(tensors=[tensor_entry(name, [4])]), "cannot be taken for a path")


def test_text_and_strings_are_counted_over_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strings(*values: str) -> bytes:
        return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))

    path = tmp_path / "m.gguf"
    monkeypatch.setattr(gguf_format, "MAX_STRINGS", 3)
    path.write_bytes(crafted([key("a", 9, strings("x", "y")), key("b", 9, strings("z"))]))
    assert read_header(path).metadata == {"a": ["x", "y"], "b": ["z"]}
    refused(
        path, crafted([key("a", 9, strings("x", "y")), key("b", 9, strings("z", ""))]), "strings in"
    )
    # Names of keys count as text too: "a" and "b" are two bytes of it.
    monkeypatch.setattr(gguf_format, "MAX_STRING_BYTES", 10)
    path.write_bytes(crafted([key("a", 8, text("1234")), key("b", 8, text("5678"))]))
    assert read_header(path).metadata == {"a": "1234", "b": "5678"}
    refused(path, crafted([key("a", 8, text("1234")), key("b", 8, text("56789"))]), "too much text")
    monkeypatch.setattr(gguf_format, "MAX_STRING_BYTES", 18)  # with a length of 8 bytes
    path.write_bytes(crafted([key("a", 9, strings("123456789"))]))
    assert read_header(path).metadata == {"a": ["123456789"]}
    refused(path, crafted([key("a", 9, strings("1234567890"))]), "too much text")


def test_arrays_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    arrays = {
        "u1": (0, [0, 255]), "i1": (1, [-128, 127]), "<u2": (2, [65535]), "<i2": (3, [-32768]),
        "<u4": (4, [1 << 31]), "<i4": (5, [-1]), "<f4": (6, [0.5]), "<u8": (10, [1 << 63]),
        "<i8": (11, [-1 << 63]), "<f8": (12, [0.1]),
    }  # fmt: skip
    keys = [
        key(
            f"k{number}",
            9,
            struct.pack("<IQ", number, len(values)) + np.array(values, name).tobytes(),
        )
        for name, (number, values) in arrays.items()
    ]
    keys.append(key("truth", 9, struct.pack("<IQ", 7, 3) + b"\1\0\2"))
    keys.append(key("empty", 9, struct.pack("<IQ", 4, 0)))
    path.write_bytes(crafted(keys))
    found = read_header(path).metadata
    for number, values in arrays.values():
        assert found[f"k{number}"].tolist() == values
    assert found["truth"].tolist() == [1, 0, 2]  # what a byte says is the reader's to judge
    assert found["empty"].tolist() == []


INTEGERS = {
    0: "UINT32", (1 << 32) - 1: "UINT32", 1 << 32: "UINT64", -1: "INT32", -(1 << 31): "INT32",
    -(1 << 31) - 1: "INT64",
}  # fmt: skip


@pytest.mark.parametrize("value", INTEGERS)
def test_whole_numbers_get_the_least_type_that_holds_them(value: int, tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", {"k.number": value, "k.short": Short(65535)})
    field = gguf.GGUFReader(path).fields["k.number"]
    assert field.types == [gguf.GGUFValueType[INTEGERS[value]]]
    assert field.contents() == value
    short = gguf.GGUFReader(path).fields["k.short"]
    assert (short.types, short.contents()) == ([gguf.GGUFValueType.UINT16], 65535)
    assert read_header(path).metadata == {"k.number": value, "k.short": 65535}


def test_other_values_keep_their_types(tmp_path: Path) -> None:
    keys = {"t": True, "f": False, "x": 0.5, "none": [], "names": ("a", "b"), "s": "größer"}
    fields = gguf.GGUFReader(written(tmp_path / "m.gguf", keys)).fields
    kinds = gguf.GGUFValueType
    assert fields["t"].types == fields["f"].types == [kinds.BOOL]
    assert [fields[name].contents() for name in ("t", "f")] == [True, False]
    assert (fields["x"].types, fields["x"].contents()) == ([kinds.FLOAT32], 0.5)
    assert fields["names"].contents() == ["a", "b"]
    assert fields["s"].contents() == "größer"
    assert read_header(tmp_path / "m.gguf").metadata["none"] == []
    for wrong in (None, [1, 2], {"a": 1}):
        with pytest.raises(TypeError, match="k: GGUF has no type"):
            header_of({"k": wrong}, [])


def test_the_journal_grows_with_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note each time that the limit is reached again, not each time from then on; a file that is
    shorter than its journal says is begun anew.
    """
    monkeypatch.setattr(gguf_container, "JOURNAL_BYTES", 48)
    tensors = [PlannedTensor(f"t{i}", F32, (6,)) for i in range(6)]  # 24 bytes, 32 with padding
    notes: list[int] = []
    sync = GgufWriter.sync

    def noted(writer: GgufWriter) -> None:
        notes.append(writer.num_done)
        sync(writer)

    monkeypatch.setattr(GgufWriter, "sync", noted)
    path = tmp_path / "m.gguf"

    def write(num: int, *, cut: int = 0) -> GgufWriter:
        writer = GgufWriter(path, {}, tensors, fingerprint="x")
        try:
            with writer:
                for tensor in writer.remaining[:num]:
                    writer.write(tensor, [torch.full((24,), 7, dtype=torch.uint8)])
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            notes.append(-1)
        return writer

    first = write(5)
    assert notes == [2, 4, 5, -1]
    assert first.num_bytes == first.layout.offsets["t5"] + 32
    left = GgufWriter(path, {}, tensors, fingerprint="x")
    assert left.num_bytes_left == 32
    assert GgufWriter(path, {}, tensors, fingerprint="y").num_bytes_left == first.num_bytes
    size = first.partial.stat().st_size
    assert size == first.layout.offsets["t5"]
    with first.partial.open("r+b") as file:
        file.truncate(size - 1)
    assert left.num_bytes_left == first.num_bytes
    assert write(6).num_done == 6
    assert write(0).num_done == 6  # whole, and only its name was missing
    with first.partial.open("r+b") as file:
        file.truncate(size)
    assert write(0).num_done == 0


def test_parts_are_cut_before_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(limit: float | None, *sizes: int) -> list[list[int]]:
        tensors = [PlannedTensor(f"t{size}", "I8", (size,)) for size in sizes]
        parts = gguf_writer._cut(tensors, limit)
        return [[tensor.num_bytes for tensor in part] for part in parts]

    assert cut(None, 5, 5) == [[5, 5]]
    assert cut(10, 5, 5, 1, 9, 1) == [[5, 5], [1, 9], [1]]
    assert cut(10, 11, 1, 12) == [[11], [1], [12]]
    monkeypatch.setattr(gguf_writer, "MAX_PARTS", 2)
    assert cut(1, 1, 1) == [[1], [1]]
    with pytest.raises(UsageError, match="too small"):
        cut(1, 1, 1, 1)


def test_names_of_parts() -> None:
    assert gguf_job.part_names(Path("a/m.gguf"), 1) == [Path("a/m.gguf")]
    assert gguf_job.part_names(Path("a/m.gguf"), 2) == [
        Path("a/m-00001-of-00002.gguf"),
        Path("a/m-00002-of-00002.gguf"),
    ]


def test_a_continued_file_is_of_the_same_source_mix_and_importance(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    entries = {"a": SimpleNamespace(file=file.name)}
    source: Any = SimpleNamespace(path=tmp_path, entries=entries)

    def found(mix: str = "Q4_K_M", **importance: list[float]) -> str:
        weights = {name: torch.tensor(values) for name, values in importance.items()}
        return gguf_job.fingerprint_of(source, mix, weights)

    first = found()
    assert found() == first
    others = [found("Q6_K"), found(a=[1.0]), found(a=[2.0]), found(b=[1.0]), found(a=[1.0, 1.0])]
    assert len({first, *others}) == 6
    assert found(a=[1.0], b=[2.0]) == found(b=[2.0], a=[1.0])
    source.path = file  # a GGUF file is its own source
    assert found() == first
    file.write_bytes(b"others, longer")
    assert found() != first


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    def part(number: int, name: str, **changes: Any) -> Path:
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": 2} | changes
        return written(
            tmp_path / f"m-0000{number + 1}-of-00002.gguf", keys, **{name: torch.ones(2)}
        )

    first = part(0, "a")
    part(1, "b")
    with read_gguf(first) as file:
        assert file.num_bytes() == 16
        assert file.files == sorted(tmp_path.iterdir())
    part(1, "a")
    with pytest.raises(CheckpointError, match="do not belong") as caught:
        read_gguf(first)
    assert "the tensor a of m-00001-of-00002.gguf again" in str(caught.value.found)
    part(1, "b", **{"split.count": 3})
    with pytest.raises(CheckpointError, match="do not belong") as caught:
        read_gguf(first)
    assert (caught.value.found, caught.value.expected) == ("part 1 of 3", "1 of 2")
    part(1, "b")
    part(0, "a", **{"split.tensors.count": 3})
    with pytest.raises(CheckpointError, match="do not belong") as caught:
        read_gguf(first)
    assert (caught.value.found, caught.value.expected) == ("2 tensors in all parts", "3 tensors")
    lone = written(tmp_path / "one.gguf", {"split.count": 1}, a=torch.ones(2))
    assert read_gguf(lone).files == [lone]


def test_only_first_parts_and_real_files_are_models(tmp_path: Path) -> None:
    written(tmp_path / "b.gguf", {}, a=torch.ones(2))
    (tmp_path / "a.gguf").write_bytes(b"GGML no")
    (tmp_path / "c.gguf").mkdir()
    written(tmp_path / "m-00002-of-00002.gguf", {}, a=torch.ones(2))
    assert gguf_files(tmp_path) == [tmp_path / "b.gguf"]


def test_what_a_file_says_is_cut_where_it_is_long(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "general.architecture": "whale",
        "eight": np.arange(8, dtype=np.int32),
        "nine": np.arange(9, dtype=np.int32),
        "names": [f"n{i}" for i in range(9)],
        "short": "x" * 200,
        "long": "x" * 201,
        "not": float("inf"),
        "tokenizer.ggml.tokens": ["a", "b"],
    }
    path = written(tmp_path / "m.gguf", keys, a=torch.ones(2, 3), b=torch.ones(5))
    with read_gguf(path) as file:
        found = gguf_summary.summary(file)
        assert gguf_summary.stored_types(file) == {"F32": (2, 11, 44)}
    shown = found["metadata"]
    assert found["architecture"] == "whale"
    assert found["parameters"] == {"total": 11}
    assert found["tokenizer"]["vocab_size"] == 2
    assert found["tokenizer"]["has_chat_template"] is False
    assert shown["eight"] == list(range(8))
    assert shown["nine"] == {"length": 9, "first": [0, 1, 2]}
    assert shown["names"] == {"length": 9, "first": ["n0", "n1", "n2"]}
    assert shown["short"] == "x" * 200
    assert shown["long"] == "x" * 200 + "... (201 characters)"
    assert shown["not"] == "inf"


def test_every_row_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_summary, "CHUNK_VALUES", 6)
    values = torch.ones(5, 3)
    values[4, 2] = torch.inf
    path = written(tmp_path / "m.gguf", {}, a__weight=values, b=torch.ones(7))
    with read_gguf(path) as file:
        assert list(gguf_summary._row_ranges(file.tensors["a.weight"])) == [(0, 2), (2, 4), (4, 5)]
        assert gguf_summary.faulty_values(file) == (["a.weight has NaN or infinity"], [])
        statuses = [(check.name, check.status) for check in check_gguf(file)]
        assert statuses == [("files", "ok"), ("values", "skipped")]
        _, found = check_gguf(file, is_deep=True)
        assert (found.status, found.detail) == ("failed", "a.weight has NaN or infinity")
    path = tmp_path / "odd.gguf"
    planned = PlannedTensor("c.weight", "Q8_K", (1, 256))
    with GgufWriter(path, {}, [planned]) as writer:
        writer.write(planned, [torch.zeros(planned.num_bytes, dtype=torch.uint8)])
    with read_gguf(path) as file:
        _, found = check_gguf(file, is_deep=True)
        assert (found.status, found.detail) == ("ok", "all finite; not decoded: Q8_K")


def test_a_closed_file_gives_its_descriptors_back(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", {}, a=torch.arange(6.0).view(2, 3))
    with read_gguf(path) as file:
        assert file.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.read_rows("a", 1, 1).shape == (0, 3)
        (descriptor,) = file._opened.values()
        assert isinstance(file, GgufFile)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


def kinds(mix: str, num_blocks: int, name: str = "ffn_down") -> list[str]:
    return [
        type_of(MIXES[mix], f"blk.{i}.{name}.weight", (8, 256), num_blocks).name
        for i in range(num_blocks)
    ]


def test_layers_that_get_more_bits() -> None:
    """llama.cpp's use_more_bits: the first and the last eighth, and every third between; written
    out by hand for 16 layers. The first sixteenth is one of 16, and none of 15.
    """
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    assert [i for i, kind in enumerate(kinds("Q4_K_M", 16)) if kind == "Q6_K"] == more
    assert kinds("Q3_K_M", 16) == ["Q5_K"] + ["Q4_K"] * 15
    assert kinds("Q3_K_M", 15) == ["Q4_K"] * 15
    assert kinds("Q2_K_L", 16) == ["Q3_K"] * 16
    assert kinds("Q4_K_M", 16, "ffn_up") == ["Q4_K"] * 16
