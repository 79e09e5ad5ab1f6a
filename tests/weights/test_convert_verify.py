"""`convert --verify`: what it lets pass and what it names. Oracles: conversions that are right, of
every type that is written, and the same files with one block, row or chunk made wrong by hand.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import hf_oracle as oracle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.model import build
from rorqual.ops.quant_types import FLOAT_TYPES, QUANT_TYPES
from rorqual.weights import save, values
from rorqual.weights.convert import encode as convert_encode
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.convert.verify import Comparison, Fault, verify
from rorqual.weights.folder import SINGLE
from rorqual.weights.gguf.file import read_gguf
from rorqual.weights.gguf.format import TensorInfo
from rorqual.weights.gguf.mixes import MIXES
from rorqual.weights.gguf.names import gguf_tensors
from rorqual.weights.names import StoredTensor, tensors_of
from rorqual.weights.open import open_source
from rorqual.weights.progress import byte_progress
from rorqual.weights.source import TensorSource
from small import lively

# Rows of 256 for the K-quants, an MTP layer, and matrices of several FP8 blocks with rests.
CONFIG = oracle.WIDE.with_changes(
    intermediate_size=512,
    moe_intermediate_size=256,
    kv_lora_rank=256,
    q_lora_rank=256,
    vocab_size=320,
    num_nextn_predict_layers=1,
    n_routed_experts=2,
    num_experts_per_tok=1,
)
SAFETENSORS = ("bf16", "float32", "fp8", "fp8 ue8m0", "hf", "shards:2", "shards:2:bf16")
TARGETS = (*SAFETENSORS, *(f"gguf:{mix}" for mix in MIXES))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    model = lively(CONFIG)
    for dtype in ("float32", "bfloat16", "fp8"):
        save(model, root / dtype, dtype)
    options = Options(Target.parse("gguf:Q4_K_M"))
    convert(root / "bfloat16", root / "gguf.gguf", options)
    return {name: root / name for name in ("float32", "bfloat16", "fp8", "gguf.gguf")}


def converted(source: Path, destination: Path, to: str, **options: object) -> Path:
    to, _, scale_format = to.partition(" ")
    chosen = Options(Target.parse(to), scale_format=scale_format or None, **options)  # type: ignore[arg-type]
    return convert(source, destination, chosen).destination


def compared(source: Path, destination: Path) -> list[Comparison]:
    return verify(source, destination, workers=1, progress=byte_progress)


def faults_of(source: Path, destination: Path) -> list[Fault]:
    return [fault for row in compared(source, destination) for fault in row.faults]


PAIRS = (
    *(("float32", to) for to in TARGETS),
    *((kind, to) for kind in ("bfloat16", "fp8", "gguf.gguf") for to in SAFETENSORS[:4]),
    ("bfloat16", "gguf:F16"),
    ("fp8", "gguf:BF16"),
    ("fp8", "shards:2:bf16"),
    ("gguf.gguf", "gguf:Q8_0"),
)


@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_a_right_conversion_passes(
    sources: dict[str, Path], kind: str, to: str, tmp_path: Path
) -> None:
    rows = compared(sources[kind], converted(sources[kind], tmp_path / "a.gguf", to))
    assert [str(fault) for row in rows for fault in row.faults] == []
    assert sum(row.num_tensors for row in rows) > 30


@pytest.mark.parametrize("keep_mtp", [True, False])
@pytest.mark.parametrize("to", ["bf16", "fp8 ue8m0", "shards:2", "gguf:Q2_K_XS"])
def test_parts_and_mtp_change_nothing(
    sources: dict[str, Path], to: str, keep_mtp: bool, tmp_path: Path
) -> None:
    options: dict[str, object] = {"keep_mtp": keep_mtp}
    if not to.startswith("shards"):
        options["max_shard_bytes"] = 300_000
    found = converted(sources["bfloat16"], tmp_path / "a.gguf", to, **options)
    rows = compared(sources["bfloat16"], found)
    assert all(row.is_within_bound for row in rows)
    assert any(row.type == "eh_proj" for row in rows) == keep_mtp


# A file of blocks as (rows, blocks of a row, bytes of a block): each makes some of it wrong.
Corruption = Callable[[np.ndarray, str], None]


def _scale(blocks: np.ndarray, kind: str, factor: float) -> None:
    row, column = blocks.shape[0] // 2, blocks.shape[1] // 2
    if kind in FLOAT_TYPES:
        _scale_values(blocks[row], kind, factor)
        return
    start = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    block = blocks[row, column]
    block[start : start + 2] = (block[start : start + 2].copy().view("<f2") * factor).view(np.uint8)


def _scale_values(row: np.ndarray, kind: str, factor: float) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    numbers = torch.from_numpy(row.reshape(-1).copy()).view(dtype) * factor
    row[...] = numbers.view(torch.uint8).numpy().reshape(row.shape)


def _swap(blocks: np.ndarray, kind: str) -> None:
    """The middle row's last block and the first of the next row."""
    row = blocks.shape[0] // 2
    first, second = blocks[row, -1].copy(), blocks[row + 1, 0].copy()
    blocks[row, -1], blocks[row + 1, 0] = second, first


def _leave_out(blocks: np.ndarray, kind: str) -> None:
    blocks[blocks.shape[0] // 2 :] = 0


def _shift(blocks: np.ndarray, kind: str) -> None:
    row = blocks.shape[0] // 2
    blocks[row + 1 :] = blocks[row:-1].copy()


CORRUPTIONS: dict[str, Corruption] = {
    "scale twice": lambda blocks, kind: _scale(blocks, kind, 2.0),
    "scale half": lambda blocks, kind: _scale(blocks, kind, 0.5),
    "swapped blocks": _swap,
    "second half not converted": _leave_out,
    "rows shifted": _shift,
}


@pytest.fixture(scope="module")
def gguf_files(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    for mix in MIXES:
        converted(sources["float32"], folder / f"{mix}.gguf", f"gguf:{mix}")
    return folder


def _one_of_each_type(path: Path) -> dict[str, tuple[TensorInfo, list[str]]]:
    """type -> a matrix that is stored so, and the checkpoint's tensors that it was made of."""
    names = {t.name: [source.name for source in t.sources] for t in gguf_tensors(CONFIG)}
    with read_gguf(path) as file:
        return {
            info.kind.name: (info, names[name])
            for name, info in file.tensors.items()
            if len(info.shape) > 1 and info.num_rows > 8
        }


# The others have the same types, in other tensors.
TESTED_FAST = ("F32", "F16", "BF16", "Q8_0", "Q5_K_M", "Q3_K_M", "Q2_K_XS")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize(
    "mix",
    [pytest.param(mix, marks=[] if mix in TESTED_FAST else pytest.mark.slow) for mix in MIXES],
)
def test_what_is_wrong_in_a_gguf_file_is_named(
    sources: dict[str, Path], gguf_files: Path, mix: str, corruption: str, tmp_path: Path
) -> None:
    path = shutil.copy(gguf_files / f"{mix}.gguf", tmp_path / "a.gguf")
    chosen = _one_of_each_type(path)
    for kind, (info, _) in chosen.items():
        raw = np.memmap(path, np.uint8, "r+", info.offset, (info.num_rows, info.row_bytes))
        CORRUPTIONS[corruption](raw.reshape(info.num_rows, -1, QUANT_TYPES[kind].block_bytes), kind)
        raw.flush()
    faults = faults_of(sources["float32"], path)
    named = {fault.tensor for fault in faults}
    for kind, (info, names) in chosen.items():
        assert named & set(names), f"{corruption} of {info.name}, {kind}"
    assert named <= {name for _, names in chosen.values() for name in names}
    for fault in faults:
        assert fault.error > fault.bound
        assert fault.tensor in str(fault)


def _change(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


MATRIX = "model.layers.0.mlp.gate_proj.weight"  # 512 x 256: 4 x 2 blocks of FP8


@pytest.mark.parametrize("corruption", ["second half", "shifted", "one value"])
@pytest.mark.parametrize("to", ["bf16", "float32", "hf"])
def test_what_is_wrong_in_safetensors_is_named(
    sources: dict[str, Path], to: str, corruption: str, tmp_path: Path
) -> None:
    def change(value: Tensor) -> Tensor:
        if corruption == "second half":
            value[256:] = 0
        elif corruption == "shifted":
            value[300:] = value[299:-1].clone()
        else:  # the next number of the type: a value that is one unit in the last place too large
            bits = value.view(torch.int16 if value.dtype == torch.bfloat16 else torch.int32)
            bits[300, 100] += 1
        return value

    converted(sources["float32"], tmp_path / "a", to)
    _change(tmp_path / "a", MATRIX, change)
    (fault,) = faults_of(sources["float32"], tmp_path / "a")
    assert fault.tensor == MATRIX
    assert fault.first_row == {"second half": 256, "shifted": 300, "one value": 300}[corruption]


def test_rows_are_those_of_the_tensor_and_not_of_a_chunk(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same faults where the matrix is read in one."""

    def shift(value: Tensor) -> Tensor:
        value[300:] = value[299:-1].clone()
        return value

    converted(sources["float32"], tmp_path / "a", "bf16")
    _change(tmp_path / "a", MATRIX, shift)
    whole = faults_of(sources["float32"], tmp_path / "a")
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 128 * 256)
    assert faults_of(sources["float32"], tmp_path / "a") == whole
    assert [fault.first_row for fault in whole] == [300]


@pytest.mark.parametrize("corruption", ["first", "twice", "half", "swapped", "codes"])
@pytest.mark.parametrize("kind", ["float32", "fp8"])
@pytest.mark.parametrize("to", ["fp8", "fp8 ue8m0"])
def test_what_is_wrong_in_fp8_is_named(
    sources: dict[str, Path], kind: str, to: str, corruption: str, tmp_path: Path
) -> None:
    def change(scale: Tensor) -> Tensor:
        if corruption == "first":  # all blocks take the scales of the first row of blocks
            scale[:] = torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None] * scale[:1]
        elif corruption == "swapped":
            scale[2] = scale[3] * 4
        else:
            scale[2, 1] *= {"twice": 2.0, "half": 0.5}[corruption]
        return scale

    def change_codes(codes: Tensor) -> Tensor:
        codes.view(torch.uint8)[300, 100] ^= 1
        return codes

    converted(sources[kind], tmp_path / "a", to)
    if corruption == "codes":
        _change(tmp_path / "a", MATRIX, change_codes)
    else:
        _change(tmp_path / "a", MATRIX + "_scale_inv", change)
    (fault,) = faults_of(sources[kind], tmp_path / "a")
    assert fault.tensor == MATRIX
    row = {"first": 0, "codes": 300}.get(corruption, 256)
    assert fault.first_row // 128 == row // 128


def test_a_power_of_two_that_is_twice_too_coarse_is_named(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4M3 hardly loses by it, so only the scale itself tells."""

    def coarse(weight: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        codes, scale = quantise(weight, **options)
        return (codes.float() / 2).to(torch.float8_e4m3fn), scale * 2

    quantise = convert_encode.quantise_blocks
    monkeypatch.setattr(convert_encode, "quantise_blocks", coarse)
    converted(sources["float32"], tmp_path / "a", "fp8 ue8m0")
    assert MATRIX in {fault.tensor for fault in faults_of(sources["float32"], tmp_path / "a")}


@pytest.mark.parametrize("exponent", [-9, 0, 3])
def test_an_exact_power_of_two_keeps_its_scale(exponent: int, tmp_path: Path) -> None:
    """A block whose greatest value is 448 * 2^k has the scale 2^k; its double is too coarse."""
    model = build(CONFIG)
    save(model, tmp_path / "a", "float32")
    amax = 448 * 2.0**exponent

    def change(value: Tensor) -> Tensor:
        value.clamp_(-amax / 2, amax / 2)[300, 200] = amax
        return value

    _change(tmp_path / "a", MATRIX, change)
    converted(tmp_path / "a", tmp_path / "b", "fp8 ue8m0")
    scale = load_file(tmp_path / "b" / SINGLE)[MATRIX + "_scale_inv"]
    assert scale[2, 1] == 2.0**exponent
    assert faults_of(tmp_path / "a", tmp_path / "b") == []

    source = load_file(tmp_path / "a" / SINGLE)[MATRIX][256:384, 128:256]

    def halve(codes: Tensor) -> Tensor:  # the nearest ones: only the scale is at fault
        codes[256:384, 128:256] = (source / 2.0 ** (exponent + 1)).to(torch.float8_e4m3fn)
        return codes

    def double(scale: Tensor) -> Tensor:
        scale[2, 1] *= 2
        return scale

    _change(tmp_path / "b", MATRIX, halve)
    _change(tmp_path / "b", MATRIX + "_scale_inv", double)
    (fault,) = faults_of(tmp_path / "a", tmp_path / "b")
    assert fault.tensor == MATRIX
    assert 256 <= fault.first_row < 384


def test_the_bound_is_each_values_own(sources: dict[str, Path], tmp_path: Path) -> None:
    """BF16 may be off by half of its last place, 2^-8 of a power of two: no more, at any size."""
    converted(sources["float32"], tmp_path / "a", "bf16")
    wide = load_file(sources["float32"] / SINGLE)[MATRIX]
    stored = load_file(tmp_path / "a" / SINGLE)[MATRIX]
    error = (stored.float() - wide).abs() / torch.exp2(torch.frexp(wide).exponent.float() - 1)
    assert 0.9 * 2.0**-8 < float(error.max()) <= 2.0**-8
    for relative in (1.5 * 2.0**-8, 16 * 2.0**-8):
        wrong = (wide * (1 + relative)).bfloat16()
        _change(tmp_path / "a", MATRIX, lambda value, wrong=wrong: wrong)  # type: ignore[misc]
        (fault,) = faults_of(sources["float32"], tmp_path / "a")
        assert fault.num_values > 0.5 * wide.numel()


def test_an_importance_is_no_excuse(sources: dict[str, Path], tmp_path: Path) -> None:
    """Columns that count for nothing may be stored badly; a wrong block is found all the same."""
    names = [t.name for t in gguf_tensors(CONFIG) if t.name.endswith("ffn_down.weight")]
    entries = struct.pack("<i", len(names))
    for name in names:
        row = np.zeros(512, "<f4")
        row[::7] = 1.0
        entries += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, 512)
        entries += row.tobytes()
    imatrix = tmp_path / "imatrix.dat"
    imatrix.write_bytes(entries)
    path = converted(sources["float32"], tmp_path / "a.gguf", "gguf:Q2_K_XS", imatrix=imatrix)

    def faults() -> list[Fault]:
        rows = verify(
            sources["float32"], path, workers=1, progress=byte_progress, has_importance=True
        )
        return [fault for row in rows for fault in row.faults]

    assert [str(fault) for fault in faults()] == []
    with read_gguf(path) as file:
        info = file.tensors["blk.0.ffn_down.weight"]
    raw = np.memmap(path, np.uint8, "r+", info.offset, (info.num_rows, info.row_bytes))
    _scale(raw.reshape(info.num_rows, -1, info.kind.block_bytes), info.kind.name, 2.0)
    raw.flush()
    assert [fault.tensor for fault in faults()] == ["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *((kind, to) for kind in ("float32", "fp8") for to in ("bf16", "fp8 ue8m0", "gguf:Q8_0")),
        ("fp8", "hf"),
        ("fp8", "shards:2"),
        ("float32", "shards:2"),
        ("bfloat16", "gguf:Q3_K_M"),
    ],
)
def test_the_size_of_chunks_changes_nothing(
    sources: dict[str, Path],
    kind: str,
    to: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Matrices of many chunks give the bytes of those read in one: every chunk, every FP8 scale."""
    whole = converted(sources[kind], tmp_path / "whole" / "a.gguf", to)
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 128 * 256)
    small = converted(sources[kind], tmp_path / "small" / "a.gguf", to)
    files = sorted(p.name for p in whole.parent.rglob("*") if p.is_file())
    for name in files:
        (first,), (second,) = whole.parent.rglob(name), small.parent.rglob(name)
        assert first.read_bytes() == second.read_bytes(), name
    assert files


# Of matrices that are taken for 512 rows high.
ROW_RANGES = ((0, 512), (0, 1), (127, 128), (128, 129), (130, 250), (200, 300), (384, 511))


@pytest.mark.parametrize("to", ["hf", "shards:2", "shards:2:bf16"])
def test_any_rows_are_those_of_the_whole(sources: dict[str, Path], to: str, tmp_path: Path) -> None:
    """Ranges that begin and end anywhere: inside an FP8 block, inside a rank, across several."""
    converted(sources["fp8"], tmp_path / "a", to)
    num_tensors = 0
    with open_source(sources["fp8"]) as ours, open_source(tmp_path / "a") as theirs:
        for tensor in tensors_of(theirs.config):
            if tensor.name not in theirs.entries or len(tensor.shape) < 2:
                continue
            whole = _dequantised(ours, tensor)
            if theirs.entries[tensor.name].dtype == "BF16":
                whole = whole.bfloat16().float()
            for span in ROW_RANGES:
                start, stop = (place * tensor.shape[0] // 512 for place in span)
                stop = max(stop, start + 1)
                rows = values.StoredRows(theirs, tensor).values(start, stop)
                assert torch.equal(rows, whole[start:stop]), (tensor.name, start, stop)
            num_tensors += 1
    assert num_tensors > 20


def _dequantised(source: TensorSource, tensor: StoredTensor) -> Tensor:
    """The plain formula, a value at a time."""
    weight = source.read_rows(tensor.name, 0, tensor.shape[0]).float()
    if source.entries[tensor.name].dtype != "F8_E4M3":
        return weight
    num_scales = source.entries[tensor.scale_name].shape[0]
    scale = source.read_rows(tensor.scale_name, 0, num_scales).float()
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    return weight * scale[rows][:, columns]


def test_nan_in_the_place_of_a_number_is_infinitely_far(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """JSON has no NaN and no infinity: text stands there, and strict readers take it."""

    def change(value: Tensor) -> Tensor:
        value[300, 100] = torch.nan
        return value

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    converted(sources["float32"], tmp_path / "a", "bf16")
    _change(tmp_path / "a", MATRIX, change)
    compared_rows = compared(sources["float32"], tmp_path / "a")
    (faulty,) = (row for row in compared_rows if not row.is_within_bound)
    assert (faulty.faults[0].first_row, faulty.faults[0].num_values) == (300, 1)
    assert faulty.max_error == faulty.relative_error == faulty.faults[0].error == float("inf")
    text = json.dumps([row.as_row() for row in compared_rows])
    rows = json.loads(text, parse_constant=refuse)
    (row,) = (row for row in rows if not row["is_within_bound"])
    assert row["max_error"] == row["relative_error"] == row["faults"][0]["error"] == "inf"


def test_the_table_as_json(sources: dict[str, Path], tmp_path: Path) -> None:
    converted(sources["float32"], tmp_path / "a", "bf16")
    _change(tmp_path / "a", MATRIX, lambda value: value.mul_(2))
    rows = json.loads(
        json.dumps([row.as_row() for row in compared(sources["float32"], tmp_path / "a")])
    )
    (faulty,) = (row for row in rows if not row["is_within_bound"])
    assert (faulty["type"], faulty["to"]) == ("mlp.gate_proj", "BF16")
    assert faulty["faults"][0]["tensor"] == MATRIX
    assert faulty["faults"][0]["error"] > faulty["faults"][0]["bound"]


@pytest.mark.parametrize("exponent", [-149, -130, -118])
def test_a_block_too_small_for_a_normal_scale_is_no_fault(exponent: int, tmp_path: Path) -> None:
    """Its scale is the least normal power of two, which no rule of closeness can blame."""
    save(build(CONFIG), tmp_path / "a", "float32")

    def change(value: Tensor) -> Tensor:
        value[:128, :128] = 0.0
        value[5, 7] = 2.0**exponent
        return value

    _change(tmp_path / "a", MATRIX, change)
    converted(tmp_path / "a", tmp_path / "b", "fp8 ue8m0")
    assert faults_of(tmp_path / "a", tmp_path / "b") == []


def test_the_greatest_error_is_of_all_tensors_of_a_type(tmp_path: Path) -> None:
    first, second = (Comparison("x", "F32", "BF16", max_error=error) for error in (0.5, 0.25))
    third = Comparison("x", "F32", "BF16", max_error=0.75)
    first.add(second)
    assert first.max_error == 0.5
    first.add(third)
    assert first.max_error == 0.75
