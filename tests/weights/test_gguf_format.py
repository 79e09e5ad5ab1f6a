"""The GGUF container: files of the `gguf` package read, ours read by it, hostile ones refused.

Oracles: `gguf.GGUFWriter` and `gguf.GGUFReader`; for hostile files the fault that we put in.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from rorqual.errors import CheckpointError
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.weights.gguf.container import GgufWriter, Short, header_of
from rorqual.weights.gguf.file import gguf_files, read_gguf
from rorqual.weights.gguf.format import MAX_KEYS, MAX_TENSORS, read_header
from rorqual.weights.planned import PlannedTensor

NUM_MUTATIONS = 2000
MAX_SECONDS = 1.0  # of the processor: other programs run here too
MAX_PARSE_BYTES = 1_000_000  # for files of some hundred bytes

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "", "Ġthe", "日本"],
    "tokenizer.ggml.token_type": np.array([1, 1, 3, 4], dtype=np.int32),
    "tokenizer.ggml.add_bos_token": True,
    "a.negative": -5,
    "a.long": 1 << 40,
}
TENSORS = [
    PlannedTensor("token_embd.weight", "Q8_0", (4, 64)),
    PlannedTensor("blk.0.ffn_gate_exps.weight", "Q4_K", (2, 3, 256)),
    PlannedTensor("output_norm.weight", "F32", (7,)),
]


def bytes_of(tensor: PlannedTensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(tensor.name))
    return torch.randint(0, 100, (tensor.num_bytes,), dtype=torch.uint8, generator=generator)


def write(path: Path, metadata: dict[str, Any] = METADATA, **options: Any) -> Path:
    with GgufWriter(path, metadata, TENSORS, **options) as writer:
        for tensor in writer.remaining:
            data = bytes_of(tensor)
            writer.write(tensor, [data[:5], data[5:]])
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_gguf_reads_what_we_write(tmp_path: Path, alignment: int) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "m.gguf", alignment=alignment))
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert [t.name for t in reader.tensors] == [t.name for t in TENSORS]
    for found, tensor in zip(reader.tensors, TENSORS, strict=True):
        assert tuple(reversed(found.shape.tolist())) == tensor.shape
        assert found.tensor_type.value == QUANT_TYPES[tensor.dtype].type_id
        assert found.data.tobytes() == bytes_of(tensor).numpy().tobytes()


def test_we_read_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "starcoder", use_temp_file=False)
    writer.add_uint8("k.u8", 200)
    writer.add_int16("k.i16", -300)
    writer.add_float64("k.f64", 0.1)
    writer.add_array("k.names", ["x", "y z"])
    writer.add_array("k.numbers", [1, 2, 3])
    writer.add_bool("k.flag", False)
    rows = np.arange(96, dtype=np.float32).reshape(3, 32)
    packed = gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("a.weight", rows)
    writer.add_tensor("b.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with read_gguf(path) as found:
        assert found.architecture == "starcoder"
        assert found.metadata["k.u8"] == 200
        assert found.metadata["k.i16"] == -300
        assert found.metadata["k.f64"] == 0.1
        assert found.metadata["k.names"] == ["x", "y z"]
        assert found.metadata["k.numbers"].tolist() == [1, 2, 3]
        assert found.metadata["k.flag"] is False
        assert torch.equal(found.read("a.weight"), torch.from_numpy(rows))
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        assert np.array_equal(found.read("b.weight").numpy(), theirs)
        assert torch.equal(found.read_rows("a.weight", 1, 2), torch.from_numpy(rows[1:2]))


def test_a_folder_and_a_split_model_are_one(tmp_path: Path) -> None:
    for number, tensor in enumerate(TENSORS):
        keys = {"split.no": Short(number), "split.count": Short(3), "split.tensors.count": 3}
        path = tmp_path / f"m-{number + 1:05}-of-00003.gguf"
        with GgufWriter(path, {**METADATA, **keys} if number == 0 else keys, [tensor]) as writer:
            writer.write(tensor, [bytes_of(tensor)])
    for opened in (
        tmp_path,
        tmp_path / "m-00001-of-00003.gguf",
        tmp_path / "m-00003-of-00003.gguf",
    ):
        with read_gguf(opened) as found:
            assert list(found.tensors) == [tensor.name for tensor in TENSORS]
            assert found.architecture == "llama"
            assert len(found.files) == 3
    assert gguf_files(tmp_path) == [tmp_path / "m-00001-of-00003.gguf"]
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf.*do not belong") as caught:
        read_gguf(tmp_path)
    assert "no such file" in str(caught.value)
    lone = (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="do not belong together"):
        read_gguf(lone)


def test_two_models_in_a_folder_are_not_one(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="several"):
        read_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_gguf(tmp_path / "c.gguf")


def write_some(writer: GgufWriter, num_done: int) -> None:
    """So many tensors and a part of the next, then Ctrl-C."""
    for tensor in writer.remaining[:num_done]:
        writer.write(tensor, [bytes_of(tensor)])
    writer._write(b"half a tensor")
    raise KeyboardInterrupt


def test_an_interrupted_file_is_continued(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"

    def interrupt(num_done: int, fingerprint: str) -> GgufWriter:
        writer = GgufWriter(path, METADATA, TENSORS, fingerprint=fingerprint)
        with pytest.raises(KeyboardInterrupt), writer:
            write_some(writer, num_done)
        return writer

    interrupt(2, "source")
    assert not path.exists()
    with GgufWriter(path, METADATA, TENSORS, fingerprint="source") as writer:
        assert [tensor.name for tensor in writer.remaining] == ["output_norm.weight"]
        writer.write(TENSORS[2], [bytes_of(TENSORS[2])])
    assert path.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]
    interrupt(2, "source")
    with GgufWriter(path, METADATA, TENSORS, fingerprint="another source") as writer:
        assert len(writer.remaining) == 3
        for tensor in writer.remaining:
            writer.write(tensor, [bytes_of(tensor)])
    assert path.read_bytes() == whole


def test_without_a_fingerprint_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), GgufWriter(tmp_path / "m.gguf", {}, TENSORS):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor_entry(name: str, sizes: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        + struct.pack("<IQ", type_id, offset)
    )


def crafted(
    keys: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 64,
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


def key(name: str | bytes, type_id: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", type_id) + value


HUGE = (1 << 64) - 1
HOSTILE = {
    "empty": b"",
    "short": b"GGUF\3\0\0\0",
    "other magic": b"GGML" + crafted()[4:],
    "version 1": crafted(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + b"\0" * 64,
    "many keys": crafted(counts=(0, HUGE)),
    "many tensors": crafted(counts=(HUGE, 0)),
    "more keys than fit": crafted(counts=(0, 1000)),
    "more tensors than fit": crafted(counts=(1000, 0)),
    "a key longer than the file": crafted([struct.pack("<Q", HUGE) + b"x" * 40], counts=(0, 1)),
    "a key without end": crafted([struct.pack("<Q", 250) + b"x" * 20], counts=(0, 1), data=0),
    "an empty key": crafted([key("", 4, b"\0" * 4)]),
    "a key that is no text": crafted([key(b"\xff\xfe", 4, b"\0" * 4)]),
    "the same key twice": crafted([key("a", 4, b"\0" * 4)] * 2),
    "an unknown type": crafted([key("a", 99, b"\0" * 8)]),
    "a truth value of 2": crafted([key("a", 7, b"\2")]),
    "text that is no UTF-8": crafted([key("a", 8, text(b"\xff\xff"))]),
    "text longer than the file": crafted([key("a", 8, struct.pack("<Q", 1 << 40))]),
    "an array of too much": crafted([key("a", 9, struct.pack("<IQ", 4, 1 << 62))]),
    "an array that overflows": crafted([key("a", 9, struct.pack("<IQ", 10, HUGE))]),
    "strings without end": crafted([key("a", 9, struct.pack("<IQ", 8, 1 << 60))]),
    "an array of arrays": crafted([key("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))]),
    "an array of nothing known": crafted([key("a", 9, struct.pack("<IQ", 77, 1))]),
    "alignment 0": crafted([key("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 33": crafted([key("general.alignment", 4, struct.pack("<I", 33))]),
    "alignment 2^31": crafted([key("general.alignment", 4, struct.pack("<I", 1 << 31))]),
    "alignment as text": crafted([key("general.alignment", 8, text("32"))]),
    "alignment as truth": crafted([key("general.alignment", 7, b"\1")]),
    "no dimensions": crafted(tensors=[tensor_entry("a", [])]),
    "five dimensions": crafted(tensors=[tensor_entry("a", [1] * 5)]),
    "a billion dimensions": crafted(tensors=[text("a") + struct.pack("<I", 1 << 30) + b"\0" * 40]),
    "a size of 0": crafted(tensors=[tensor_entry("a", [4, 0])]),
    "sizes that overflow": crafted(tensors=[tensor_entry("a", [1 << 33, 1 << 33])]),
    "sizes that wrap to little": crafted(tensors=[tensor_entry("a", [1 << 32, 1 << 32, 4])]),
    "a size of 2^64 - 1": crafted(tensors=[tensor_entry("a", [HUGE])]),
    "an unknown tensor type": crafted(tensors=[tensor_entry("a", [4], 4)]),
    "rows of half a block": crafted(tensors=[tensor_entry("a", [48], 8)]),
    "an offset outside": crafted(tensors=[tensor_entry("a", [4], 0, 1 << 40)]),
    "an offset that overflows": crafted(tensors=[tensor_entry("a", [4], 0, HUGE - 31)]),
    "an offset not aligned": crafted(tensors=[tensor_entry("a", [4], 0, 4)]),
    "data outside": crafted(tensors=[tensor_entry("a", [1000])]),
    "two in one place": crafted(tensors=[tensor_entry("a", [4]), tensor_entry("b", [4])]),
    "the same name twice": crafted(tensors=[tensor_entry("a", [4]), tensor_entry("a", [4], 0, 32)]),
    "a path as a name": crafted(tensors=[tensor_entry("../../etc/passwd", [4])]),
    "an absolute path": crafted(tensors=[tensor_entry("/tmp/x", [4])]),
    "a path of Windows": crafted(tensors=[tensor_entry("a\\b", [4])]),
    "a name with a NUL": crafted(tensors=[tensor_entry("a\0b", [4])]),
    "a name with an escape": crafted(tensors=[tensor_entry("\x1b[2Ja", [4])]),
    "an empty name": crafted(tensors=[tensor_entry("", [4])]),
    "a long name": crafted(tensors=[tensor_entry("a" * 5000, [4])]),
    "more keys than the limit": crafted(counts=(0, MAX_KEYS + 1), data=20 * MAX_KEYS),
    "more tensors than the limit": crafted(counts=(MAX_TENSORS + 1, 0), data=40 * MAX_TENSORS),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[fault])
    began = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert time.process_time() - began < MAX_SECONDS
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said", "mend"),
    [
        (HOSTILE["data outside"], "is not a whole GGUF file", "download or copy"),
        (HOSTILE["an unknown tensor type"], "tensor a has type number 4", "another quantisation"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) * 2, "version 1", "current converter"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) * 2, "big-endian", "little-endian machines"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer", "git lfs pull"),
        (b"\n<html><body>Sign in</body></html>", "web page", "download"),
    ],
)
def test_the_mend_fits_the_fault(tmp_path: Path, content: bytes, said: str, mend: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_gguf(path)
    assert mend in str(caught.value.fix)
    assert ("download" in str(caught.value.fix)) == ("download" in mend)


def test_crafted_files_are_whole_without_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    aligned = key("general.alignment", 4, struct.pack("<I", 32))
    path.write_bytes(crafted([aligned], [tensor_entry("a", [4]), tensor_entry("b", [4], 0, 32)]))
    assert list(read_gguf(path).tensors) == ["a", "b"]


def mutations(whole: bytes, header: int) -> list[Callable[[random.Random], bytes]]:
    def cut(dice: random.Random) -> bytes:
        return whole[: dice.randrange(len(whole))]

    def flip(dice: random.Random) -> bytes:
        changed = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            changed[dice.randrange(header)] = dice.randrange(256)
        return bytes(changed)

    def plant(dice: random.Random) -> bytes:
        """A number of eight or four bytes where one may be."""
        numbers = (0, 1, 255, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, HUGE)
        place = dice.randrange(header - 8)
        packed = struct.pack("<Q", dice.choice(numbers))[: dice.choice((4, 8))]
        return whole[:place] + packed + whole[place + len(packed) :]

    def move(dice: random.Random) -> bytes:
        first, last = sorted(dice.sample(range(header), 2))
        other = whole[first:last] * dice.choice((0, 2))
        return whole[:first] + other + whole[last:]

    return [cut, flip, plant, move]


def test_mutated_files_never_do_harm(tmp_path: Path, file: Path) -> None:
    """Each is read, or refused as a CheckpointError, within a second and little memory."""
    whole, header = file.read_bytes(), read_header(file).num_bytes
    path, dice = tmp_path / "mutated.gguf", random.Random(0)
    kinds = mutations(whole, header)
    num_refused = 0
    tracemalloc.start()
    for number in range(NUM_MUTATIONS):
        path.write_bytes(kinds[number % len(kinds)](dice))
        began = time.process_time()
        try:
            with read_gguf(path) as opened:
                for name in opened.tensors:
                    opened.read_raw(name, 0, opened.tensors[name].num_rows)
        except CheckpointError:
            num_refused += 1
        assert time.process_time() - began < MAX_SECONDS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_PARSE_BYTES
    assert num_refused > NUM_MUTATIONS // 2


def test_a_file_that_shrinks_after_opening_is_an_error(file: Path) -> None:
    with read_gguf(file) as opened:
        file.write_bytes(file.read_bytes()[: opened.tensors["output_norm.weight"].offset + 3])
        with pytest.raises(CheckpointError, match="output_norm"):
            opened.read("output_norm.weight")


def test_a_million_strings_are_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header_of({"a": ["token"] * 1_000_000}, []).header)
    began = time.process_time()
    assert len(read_header(path).metadata["a"]) == 1_000_000
    assert time.process_time() - began < MAX_SECONDS
