"""Checkpoints of every kind as their readers see them: rows, sizes, headers, faults. Oracles: the
whole tensors, files written byte by byte, and the `safetensors` library.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.errors import CheckpointError, RorqualError
from rorqual.model import build
from rorqual.tokenizer import train_tokenizer
from rorqual.weights import load, save, values
from rorqual.weights.audit import audit
from rorqual.weights.checks import Check, _shown, check_folder, stored_elements
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.folder import SINGLE, open_folder, refuse_absurd
from rorqual.weights.gguf.reader import open_gguf
from rorqual.weights.names import layer_of
from rorqual.weights.not_weights import pickle_fix
from rorqual.weights.open import kind_of, load_config, open_source
from rorqual.weights.planned import PlannedTensor, Region, planned_tensors
from rorqual.weights.quantization_config import quantisation_of, unknown_quantisation_keys
from rorqual.weights.safetensors_file import RowFiles, lay_out, looks_like_safetensors, read_places
from rorqual.weights.shards.names import region_of, scale_region
from rorqual.weights.source import Quantisation
from small import lively

CONFIG = oracle.CONFIGS["mtp"]


def run(source: Path, destination: Path, to: str, **options: Any) -> Path:
    return convert(source, destination, Options(Target.parse(to), **options)).destination


def safetensors(path: Path, table: Any, data: bytes = b"", length: int | None = None) -> Path:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("to", ["gguf:F32", "gguf:Q8_0", "shards:2"])
def test_any_rows_are_those_of_the_whole_tensor(to: str, tmp_path: Path) -> None:
    """Inside a head of kv_b_proj, whose halves GGUF has apart, inside a stack, inside a rank."""
    model = lively(CONFIG)
    save(model, tmp_path / "hf")
    path = run(tmp_path / "hf", tmp_path / "a.gguf", to)
    whole = load_file(tmp_path / "hf" / SINGLE)
    with open_source(path) as source:
        assert source.num_bytes() <= sum(tensor.nbytes for tensor in whole.values())
        for name in source.entries:
            if ".layers.2." in name or ".experts.4." in name:
                continue  # layers and experts enough
            values = source.read_rows(name, 0, source.entries[name].shape[0])
            if to != "gguf:Q8_0":
                assert torch.equal(values, whole[name]), name
            size = len(values)
            for start, stop in ((0, 1), (size // 3, size // 2 + 1), (size - 1, size), (1, size)):
                rows = source.read_rows(name, start, stop)
                assert torch.equal(rows, values[start:stop]), (name, start, stop)


def test_safetensors_headers_are_held_against_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = {"a": entry("F32", [1, 2], 0, 8), "b": entry("U8", [0], 8, 8)}
    places = read_places(safetensors(path, whole, b"\0" * 8))
    assert (places["a"].num_bytes, places["b"].shape) == (8, (0,))
    assert places["a"].offset == path.stat().st_size - 8
    for table in (
        {"a": entry("F32", [1, 2], 1, 9)},  # one byte behind the end
        {"a": entry("F32", [2], 0, 4)},
        {"a": entry("F32", [-2], 0, -8)},
        {"a": entry("F32", [True, 2], 0, 8)},
        {"a": entry("F32", [2.0], 0, 8)},
        {"a": entry("I4", [16], 0, 8)},
        {"a": {"dtype": "F32", "shape": [2]}},
        [1],
        json.dumps({"a": whole["a"], "B": whole["a"]}).replace("B", "a").encode(),
        b"{",
    ):
        with pytest.raises(CheckpointError, match="not a whole safetensors"):
            read_places(safetensors(path, table, b"\0" * 8))
    size = len(json.dumps({}).encode())
    assert read_places(safetensors(path, {}, length=size)) == {}
    for length in (size + 1, 1 << 62):
        with pytest.raises(CheckpointError, match=f"a header of {length:,} bytes"):
            read_places(safetensors(path, {}, length=length))
    for content in (b"", b"\2\0\0\0\0\0\0"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a whole safetensors"):
            read_places(path)


def test_what_looks_like_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert looks_like_safetensors(safetensors(path, {}))
    assert not looks_like_safetensors(safetensors(path, {}, length=3))
    assert not looks_like_safetensors(safetensors(path, {}, length=1))
    assert not looks_like_safetensors(safetensors(path, b"[]"))
    path.write_bytes(b"\2\0\0\0\0\0\0{")
    assert not looks_like_safetensors(path)


def test_a_planned_file_is_the_librarys(tmp_path: Path) -> None:
    """Wide types first, then names by their bytes, the header filled up to whole eights."""
    dtypes = {
        "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F32": torch.float32,
        "F16": torch.float16, "BF16": torch.bfloat16,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    plan = []
    for number, (name, dtype) in enumerate(dtypes.items()):
        for letter in ("ö", "z", "Z"):
            shape = (number + 1, 3) if letter != "z" else (0,)
            tensors[letter + name] = torch.ones(shape).to(dtype)
            plan.append(PlannedTensor(letter + name, name, shape))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    layout = lay_out(plan)
    theirs = (tmp_path / "theirs").read_bytes()
    assert theirs.startswith(layout.header)
    assert layout.num_bytes == len(theirs)
    places = read_places(tmp_path / "theirs")
    assert layout.offsets == {name: place.offset for name, place in places.items()}


def test_files_are_opened_once_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"a": torch.arange(6.0).view(3, 2)}, path)
    files = RowFiles()
    assert files.rows(path, "a", 1, 3).tolist() == [[2, 3], [4, 5]]
    assert files.rows(path, "a", 2, 2).shape == (0, 2)
    ((descriptor, _),) = files._opened.values()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="the file ends at byte"):
        files.rows(path, "a", 2, 3)
    files.close()
    assert files._opened == {}
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    ("shape", "block", "step"),
    [
        ((1000, 10), None, 128),  # a chunk of 128 rows and not 199: between blocks
        ((1000, 10), (96, 96), 384),  # the least common multiple of 96 and 128
        ((5000,), None, 1990),  # no rows to be kept together
        ((1000, 4000), None, 128),  # at least a block, however wide
    ],
)
def test_chunks_end_between_blocks(
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 1990)
    found = SimpleNamespace(shape=shape, dtype="F32")
    source: Any = SimpleNamespace(
        entries={"a": found}, quantisation=None if block is None else Quantisation(block)
    )
    rows = values.StoredRows(source, SimpleNamespace(name="a"))  # type: ignore[arg-type]
    chunks = rows.chunks()
    assert chunks[0] == (0, min(step, shape[0]))
    assert chunks[1] == (step, min(2 * step, shape[0]))
    assert chunks[-1][1] == shape[0]
    assert rows.chunks((128, 130)) == [(128, 130)]


def test_a_scale_of_zero_is_no_fault(tmp_path: Path) -> None:
    save(build(oracle.BASE), tmp_path, "fp8")
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name + "_scale_inv"] = torch.zeros(1, 1)
    save_file(tensors, tmp_path / SINGLE)
    assert not load(tmp_path).state_dict()[name].any()


def test_layers_by_their_names() -> None:
    assert layer_of("model.layers.61.enorm.weight") == 61
    assert layer_of("model.layers.6x.enorm.weight") is None
    assert layer_of("model.layers.1234567890.x") is None
    assert layer_of("a.model.layers.1.x") is None


def test_counts_of_what_is_stored(tmp_path: Path) -> None:
    save(build(CONFIG), tmp_path, "fp8")
    tensors = load_file(tmp_path / SINGLE)
    found = {
        ("F8_E4M3" if t.dtype == torch.float8_e4m3fn else "BF16" if t.dtype == torch.bfloat16
         else "F32 scales" if n.endswith("_scale_inv") else "F32"): (0, 0)
        for n, t in tensors.items()
    }  # fmt: skip
    for name, tensor in tensors.items():
        kind = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
        kind += " scales" if name.endswith("_scale_inv") else ""
        found[kind] = (found[kind][0] + 1, found[kind][1] + tensor.numel())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / SINGLE)
    with open_folder(tmp_path) as folder:
        assert stored_elements(folder) == found


def test_a_tokenizer_as_large_as_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["words to learn from"] * 20, 300)
    for extra, status in ((0, "ok"), (-1, "failed")):
        folder = tmp_path / status
        save(build(oracle.BASE.with_changes(vocab_size=tokenizer.vocab_size + extra)), folder)
        tokenizer.save(folder)
        (found,) = (c for c in check_folder(folder).checks if c.name == "tokenizer")
        assert found.status == status
    save(build(oracle.SOFTMAX), tmp_path / "v2")
    path = run(tmp_path / "v2", tmp_path / "m.gguf", "gguf:F32")
    checks = {check.name: check for check in check_folder(path).checks}
    assert checks["tokenizer"] == Check("tokenizer", "skipped", "none in the file")
    assert checks["router bias"].status == "skipped"


def test_faults_are_shown_up_to_twenty() -> None:
    names = [f"fault {i}" for i in range(22)]
    assert _shown(names[:20]).splitlines() == names[:20]
    assert _shown(names[:21]).splitlines() == [*names[:20], "and 1 more"]
    assert _shown(names).splitlines()[-1] == "and 2 more"


def test_other_faults_leave_the_values_unread(tmp_path: Path) -> None:
    save(build(oracle.BASE), tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.norm.weight"][3] = torch.nan
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / SINGLE)
    found = {check.name: check for check in check_folder(tmp_path, is_deep=True).checks}
    assert (found["values"].status, found["tensors"].status) == ("skipped", "failed")
    assert found["layers"].status == "ok"


def test_a_bias_of_another_type_is_said(tmp_path: Path) -> None:
    save(build(oracle.BASE), tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].half()
    save_file(tensors, tmp_path / SINGLE)
    with open_folder(tmp_path) as folder:
        assert audit(folder).notes == [f"{name} is stored in F16: rounded before we read it"]
    (bias,) = (c for c in check_folder(tmp_path).checks if c.name == "router bias")
    assert (bias.status, bias.detail) == ("failed", f"{name} is F16")


def test_a_shape_is_absurd_from_ten_million_tensors_on(tmp_path: Path) -> None:
    """3 projections an expert and 10 tensors beside them, in each layer."""
    fine = oracle.BASE.with_changes(n_routed_experts=30, num_hidden_layers=100_000)
    refuse_absurd(fine, tmp_path, 7)  # just ten million
    with pytest.raises(CheckpointError, match="far more tensors") as caught:
        refuse_absurd(fine.with_changes(num_hidden_layers=100_001), tmp_path, 7)
    assert caught.value.found == "100001 layers of 30 experts"
    with pytest.raises(CheckpointError, match="far more tensors"):
        refuse_absurd(fine.with_changes(num_nextn_predict_layers=1), tmp_path, 7)


FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": FP8}, Quantisation((128, 128), is_ue8m0=False)),
        (
            {"quantization_config": FP8 | {"scale_fmt": "ue8m0", "weight_block_size": [1, 256]}},
            Quantisation((1, 256), is_ue8m0=True),
        ),
        ({"quantization_config": FP8 | {"scale_fmt": "float", "fmt": "e4m3"}}, Quantisation()),
        ({"quantization_config": FP8 | {"fmt": "float8_e4m3fn"}}, Quantisation()),
        ({"quantization": {}, "quantization_config": FP8}, Quantisation()),
    ],
)
def test_quantisations_that_are_read(
    table: dict[str, Any], found: Quantisation | None, tmp_path: Path
) -> None:
    assert quantisation_of(table, tmp_path) == found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (FP8 | {"fmt": "e5m2"}, "fp8 in this form"),
        (FP8 | {"scale_fmt": "e8m0x"}, "fp8 in this form"),
        (FP8 | {"weight_block_size": [128]}, "not a pair"),
        (FP8 | {"weight_block_size": [128, -1]}, "not a pair"),
        (FP8 | {"weight_block_size": [128, True]}, "not a pair"),
        (FP8 | {"weight_block_size": (128, 128)}, "not a pair"),
        ({"bits": 4, "group_size": 64}, "mlx in this form"),
        ({"bits": 4}, "an unnamed method in this form"),
        ("fp8", "not an object"),
    ],
)
def test_quantisations_that_are_refused(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        quantisation_of({"quantization_config": value}, tmp_path)


def test_what_a_quantisation_says_in_vain() -> None:
    table = FP8 | {"dequantize": False, "zeta": 1, "alpha": 2, "ignored_layers": []}
    found = unknown_quantisation_keys({"quantization_config": table})
    assert found == ["quantization_config.alpha", "quantization_config.zeta"]
    assert unknown_quantisation_keys({"quantization_config": "x"}) == []


def test_pickles_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content, is_pickle in ((b"PK\x03\x04...", True), (b"\x80\x02x", True), (b"PK\x03", False)):
        path.write_bytes(content)
        assert (pickle_fix([path]) is not None) is is_pickle
    assert pickle_fix([]) is None
    assert pickle_fix([tmp_path / "absent"]) is None


def test_the_parts_of_ranks() -> None:
    """The second of four ranks; blocks of 128 under a rank that begins and ends between them."""
    projection = "model.layers.0.self_attn.{}.weight"
    assert region_of(projection.format("q_b_proj"), (16, 6), 1, 4, 8) == Region((4, 8))
    assert region_of(projection.format("o_proj"), (6, 16), 1, 4, 8) == Region((0, 6), (4, 8))
    assert region_of(projection.format("q_a_proj"), (16, 6), 1, 4, 8) == Region((0, 16))
    for expert_id in range(8):
        name = f"model.layers.1.mlp.experts.{expert_id}.up_proj.weight"
        part = region_of(name, (16, 6), 1, 4, 8)
        assert part == (Region((0, 16)) if expert_id in (2, 3) else None)
    assert scale_region(Region((128, 384), (256, 300))) == Region((1, 3), (2, 3))
    assert scale_region(Region((0, 129)), (64, 128)) == Region((0, 3))
    assert scale_region(Region((0, 129), (128, 300)), (64, 100)) == Region((0, 3), (1, 3))


def test_a_folder_of_shards_says_which_rank_lacks_what(tmp_path: Path) -> None:
    save(build(oracle.BASE), tmp_path / "hf", "bfloat16")
    folder = run(tmp_path / "hf", tmp_path / "shards", "shards:4")
    (folder / "model2-mp4.safetensors").unlink()
    with pytest.raises(RorqualError) as caught:
        load(folder)
    assert "no such file: model2-mp4.safetensors" in str(caught.value)
    assert "model1-mp4.safetensors" not in str(caught.value)
    assert kind_of(folder) == "shards"
    assert load_config(folder) == oracle.BASE.with_changes(
        initializer_range=load_config(folder).initializer_range
    )


def test_an_mtp_layer_that_the_demos_configuration_does_not_name(tmp_path: Path) -> None:
    save(build(CONFIG), tmp_path / "hf", "bfloat16")
    folder = run(tmp_path / "hf", tmp_path / "shards", "shards:2", keep_mtp=True)
    (folder / "config.json").unlink()
    assert load(folder).config.num_nextn_predict_layers == 0
    first = folder / "model0-mp2.safetensors"
    save_file(load_file(first) | {"layers.2.ffn.w9.weight": torch.ones(1)}, first)
    with pytest.raises(RorqualError, match=r"unexpected: layers\.2\.ffn\.w9\.weight \[1\]"):
        load(folder)


def test_gguf_of_a_shape_that_its_file_cannot_have(tmp_path: Path) -> None:
    """As many layers as tensors is possible; the audit then names those that are missing."""
    save(build(CONFIG), tmp_path / "hf")
    path = run(tmp_path / "hf", tmp_path / "m.gguf", "gguf:F32")
    with open_gguf(path) as source:
        file = source.file
        names = {tensor.name for tensor in planned_tensors(CONFIG, "float32")}
        assert set(source.entries) <= names
        assert source.faults == []
        for num, is_possible in ((len(file.tensors), True), (len(file.tensors) + 1, False)):
            file.metadata["deepseek2.block_count"] = num
            if is_possible:
                assert type(source)(file).config.num_layers_with_mtp == num
                continue
            with pytest.raises(CheckpointError, match="far more tensors"):
                type(source)(file)
