"""Broken checkpoints and configurations: each gives one RorqualError that names the place and the
mend, and nothing on disk changes. Oracle: the fault we put in ourselves.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.errors import CheckpointError, RorqualError, UsageError
from rorqual.model import DeepseekV3, build
from rorqual.tokenizer import train_tokenizer
from rorqual.weights import load, load_config, save
from rorqual.weights.folder import INDEX, SINGLE
from rorqual.weights.quantization_config import quantisation_of

CONFIG = oracle.CONFIGS["tied_mtp"].with_changes(tie_word_embeddings=False)
NORM = "model.layers.0.input_layernorm.weight"
PROJECTION = "model.layers.0.mlp.down_proj.weight"
SCALE = PROJECTION + "_scale_inv"
MTP = "model.layers.3."


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    torch.manual_seed(0)
    return build(CONFIG)


def snapshot(folder: Path) -> dict[str, bytes]:
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = json.loads((folder / file).read_text())
        for key, value in changes.items():
            if value is ...:
                table.pop(key, None)
            else:
                table[key] = value
        (folder / file).write_text(json.dumps(table))

    return change


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return edit_json("config.json", **changes)


def edit_map(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text())
        for name, value in changes.items():
            table["weight_map"][name.replace("__", ".")] = value
        (folder / INDEX).write_text(json.dumps(table))

    return change


def edit_tensors(**changes: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        for edit in changes.values():
            edit(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return change


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    return edit_tensors(edit=lambda tensors: tensors.update({name: value}))


def drop(*names: str) -> Callable[[Path], None]:
    return edit_tensors(edit=lambda tensors: [tensors.pop(name) for name in names])


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data) and None


def truncate(file: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return change


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def add_to_second_shard(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        last = sorted(folder.glob("*.safetensors"))[-1]
        tensors = load_file(last)
        tensors[name] = torch.ones(CONFIG.hidden_size)
        save_file(tensors, last)

    return change


def swap_files_in_index(folder: Path) -> None:
    table = json.loads((folder / INDEX).read_text())
    files = sorted(set(table["weight_map"].values()))
    table["weight_map"][NORM] = files[-1]
    (folder / INDEX).write_text(json.dumps(table))


def make_weights_a_folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


HUGE_HEADER = struct.pack("<Q", 2**60) + b"{}"
LIAR = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4302350824\n"
PAGE = "\n<!doctype html>\n<html lang='en'><title>Sign in</title></html>"
SHORT_BODY = struct.pack("<Q", len(LIAR)) + LIAR + bytes(8)

Change = Callable[[Path], object]
# (what was done, format, number of shards, the change, what the message must say)
CASES: list[tuple[str, str, int, Change, tuple[str, ...]]] = [
    ("no config", "float32", 1, remove("config.json"), ("config.json", "no such file")),
    ("config cut", "float32", 1, truncate("config.json", 0.5), ("config.json", "valid JSON")),
    ("config a list", "float32", 1, write("config.json", "[]"), ("config.json", "JSON object")),
    ("config binary", "float32", 1, write("config.json", b"\xff\xfe"), ("config.json",)),
    ("unknown key", "float32", 1, edit_config(num_expert_per_tok=2), ("num_experts_per_tok",)),
    ("wrong type", "float32", 1, edit_config(hidden_size="wide"), ("hidden_size", "wide")),
    ("negative", "float32", 1, edit_config(num_hidden_layers=-1), ("num_hidden_layers",)),
    ("missing key", "float32", 1, edit_config(kv_lora_rank=...), ("kv_lora_rank",)),
    (
        "other model",
        "float32",
        1,
        edit_config(architectures=["LlamaForCausalLM"]),
        ("LlamaForCausalLM", "DeepseekV3ForCausalLM"),
    ),
    (
        "other rope",
        "float32",
        1,
        edit_config(rope_scaling={"type": "linear", "factor": 2}),
        ("linear", "yarn"),
    ),
    ("uneven groups", "float32", 1, edit_config(n_group=3), ("n_group", "n_routed_experts")),
    (
        "a billion layers",
        "float32",
        1,
        edit_config(num_hidden_layers=10**9),
        ("config.json", "layers"),
    ),
    ("more layers", "float32", 1, edit_config(num_hidden_layers=9), ("missing", "config.json")),
    (
        "fewer layers",
        "float32",
        1,
        edit_config(num_hidden_layers=1),
        ("unexpected", "num_hidden_layers"),
    ),
    (
        "no MTP in config",
        "float32",
        1,
        edit_config(num_nextn_predict_layers=0),
        ("unexpected", "num_nextn_predict_layers"),
    ),
    (
        "another width",
        "float32",
        1,
        edit_config(hidden_size=32),
        ("wrong shape", "[128, 64]", "[128, 32]", "and", "more"),
    ),
    (
        "other quantisation",
        "bfloat16",
        1,
        edit_config(quantization_config={"quant_method": "awq"}),
        ("quantization_config", "awq", "FP8 or BF16 release"),
    ),
    (
        "bitsandbytes",
        "bfloat16",
        1,
        edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("bitsandbytes", "model.dequantize()"),
    ),
    (
        "mlx",
        "bfloat16",
        1,
        edit_config(quantization={"group_size": 64, "bits": 4}),
        ("mlx", "mlx_lm.convert --dequantize"),
    ),
    (
        "misspelt block size",
        "fp8",
        1,
        edit_config(quantization_config={"quant_method": "fp8", "weight_blok_size": [64, 64]}),
        ("quantization_config.weight_block_size", "correct the spelling"),
    ),
    (
        "one scale for a tensor",
        "fp8",
        1,
        edit_config(quantization_config={"quant_method": "fp8", "weight_block_size": None}),
        ("weight_block_size", "whole tensor", "FP8 or BF16 release"),
    ),
    ("weights a pointer", "float32", 1, write(SINGLE, POINTER), ("git-lfs", "git lfs pull")),
    (
        "shards are pointers",
        "float32",
        3,
        lambda folder: [file.write_text(POINTER) for file in folder.glob("*.safetensors")] and None,
        ("model-00001-of", "model-00003-of", "git lfs pull"),
    ),
    ("config a pointer", "float32", 1, write("config.json", POINTER), ("git lfs pull",)),
    ("config a web page", "float32", 1, write("config.json", PAGE), ("is a web page",)),
    (
        "weights are a pickle",
        "float32",
        1,
        lambda folder: torch.save({}, (folder / SINGLE).rename(folder / "pytorch_model.bin")),
        ("pytorch_model.bin", "convert it to safetensors"),
    ),
    (
        "an adapter",
        "float32",
        1,
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json") and None,
        ("config.json", "merge_and_unload"),
    ),
    (
        "bad block size",
        "fp8",
        1,
        edit_config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}),
        ("weight_block_size", "[0, 128]"),
    ),
    (
        "FP8 without its config",
        "fp8",
        1,
        edit_config(quantization_config=...),
        ("quantization_config", PROJECTION),
    ),
    ("no weights", "float32", 1, remove(SINGLE), (SINGLE, "no safetensors")),
    ("weights a folder", "float32", 1, make_weights_a_folder, (SINGLE,)),
    ("weights empty", "float32", 1, write(SINGLE, b""), (SINGLE, "cannot be read")),
    ("weights cut", "float32", 1, truncate(SINGLE, 0.7), (SINGLE, "truncated")),
    ("header cut", "float32", 1, truncate(SINGLE, 0.001), (SINGLE, "truncated")),
    ("a web page", "float32", 1, write(SINGLE, "<!DOCTYPE html><html>" * 9), (SINGLE, "web page")),
    ("huge header", "float32", 1, write(SINGLE, HUGE_HEADER), (SINGLE, "cannot be read")),
    ("body too short", "float32", 1, write(SINGLE, SHORT_BODY), (SINGLE, "cannot be read")),
    ("no index", "float32", 3, remove(INDEX), (INDEX, "00001-of-")),
    ("index cut", "float32", 3, truncate(INDEX, 0.5), (INDEX, "valid JSON")),
    ("index empty", "float32", 3, write(INDEX, "{}"), (INDEX, "weight_map")),
    ("index of numbers", "float32", 3, edit_map(model__norm__weight=7), (INDEX, "7")),
    (
        "index leaves the folder",
        "float32",
        3,
        edit_map(model__norm__weight="../model.safetensors"),
        (INDEX, "outside the folder", "../model.safetensors"),
    ),
    (
        "index leaves the folder, Windows",
        "float32",
        3,
        edit_map(model__norm__weight="C:\\x\\model.safetensors"),
        (INDEX, "outside the folder"),
    ),
    (
        "index goes to the root",
        "float32",
        3,
        edit_map(model__norm__weight="/dev/zero"),
        (INDEX, "outside the folder", "/dev/zero"),
    ),
    ("shard missing", "float32", 3, remove("*00002-of*"), ("no such file", "00002-of-")),
    ("shard cut", "float32", 3, truncate("model-00001-of-00003.safetensors", 0.9), ("truncated",)),
    ("index wrong", "float32", 3, swap_files_in_index, ("misplaced", NORM)),
    (
        "index has more",
        "float32",
        3,
        edit_map(model__extra__weight="model-00001-of-00003.safetensors"),
        ("model.extra.weight", "model-00001"),
    ),
    ("repeated", "float32", 3, add_to_second_shard(NORM), ("repeated", NORM, "model-00001")),
    ("not in index", "float32", 3, add_to_second_shard("model.x"), ("not in the index", "model.x")),
    (
        "single file and shards",
        "float32",
        3,
        write(SINGLE, SHORT_BODY),
        (SINGLE, INDEX, "both"),
    ),
    ("missing", "float32", 1, drop(NORM, MTP + "enorm.weight"), (NORM, MTP + "enorm", "2 faults")),
    ("unexpected", "float32", 1, put("model.extra", torch.ones(2)), ("unexpected: model.extra",)),
    ("misshapen", "float32", 1, put(NORM, torch.ones(65)), ("wrong shape", NORM, "[65]", "[64]")),
    ("misshapen copy", "float32", 1, put(MTP + "embed_tokens.weight", torch.ones(2)), ("[2]",)),
    (
        "integers",
        "float32",
        1,
        put(NORM, torch.ones(64, dtype=torch.int64)),
        ("wrong dtype", NORM, "I64"),
    ),
    (
        "E5M2",
        "fp8",
        1,
        put(PROJECTION, torch.ones(64, 96).to(torch.float8_e5m2)),
        ("wrong dtype", PROJECTION, "F8_E5M2"),
    ),
    (
        "FP8 norm",
        "fp8",
        1,
        put(NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        ("wrong dtype", NORM),
    ),
    ("no scale", "fp8", 1, drop(SCALE), ("missing scale", SCALE)),
    ("misshapen scale", "fp8", 1, put(SCALE, torch.ones(2, 1)), (SCALE, "[2, 1]", "[1, 1]")),
    ("integer scale", "fp8", 1, put(SCALE, torch.ones(1, 1, dtype=torch.uint8)), (SCALE, "U8")),
    ("scale is NaN", "fp8", 1, put(SCALE, torch.full((1, 1), torch.nan)), (SCALE, "not finite")),
    ("scale negative", "fp8", 1, put(SCALE, torch.full((1, 1), -1.0)), (SCALE, "negative")),
    (
        "scale without FP8",
        "fp8",
        1,
        put(PROJECTION, torch.ones(64, 96, dtype=torch.bfloat16)),
        (SCALE, "unexpected"),
    ),
    (
        "tied but different",
        "float32",
        1,
        edit_config(tie_word_embeddings=True),
        ("lm_head.weight", "tie_word_embeddings"),
    ),
]


@pytest.mark.parametrize(
    ("dtype", "num_shards", "change", "words"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_broken_checkpoint(
    model: DeepseekV3,
    dtype: Any,
    num_shards: int,
    change: Change,
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    limit = 5e9 if num_shards == 1 else 400_000
    save(model, folder, dtype, max_shard_bytes=limit)
    assert len(list(folder.glob("*.safetensors"))) == num_shards
    load(folder)
    change(folder)
    before = snapshot(folder)
    with pytest.raises(RorqualError) as caught:
        load(folder)
    message = str(caught.value)
    for word in (*words, str(folder)):
        assert word in message, message
    assert caught.value.fix, f"no mend: {message}"
    assert snapshot(folder) == before


# Files that are not as they were written, which a new copy heals, and those that may be so.
DAMAGED = (
    "weights empty", "weights cut", "header cut", "huge header", "shard cut", "shard missing",
)  # fmt: skip
MAYBE_DAMAGED = (
    "index wrong", "index has more", "repeated", "not in index", "weights a folder",
    "body too short", "scale is NaN", "scale negative",
)  # fmt: skip


def test_only_damage_is_told_to_download_again(model: DeepseekV3, tmp_path: Path) -> None:
    """The mend is one that helps: a new copy heals a cut file, and nothing else."""
    for name, dtype, num_shards, change, _ in CASES:
        folder = tmp_path / name.replace(" ", "_")
        save(model, folder, dtype, max_shard_bytes=5e9 if num_shards == 1 else 400_000)  # type: ignore[arg-type]
        change(folder)
        with pytest.raises(RorqualError) as caught:
            load(folder)
        is_said = "download or copy" in str(caught.value.fix)
        assert not is_said or name in (*DAMAGED, *MAYBE_DAMAGED), name
        assert is_said or name not in DAMAGED, name


def test_files_that_the_system_withholds(
    model: DeepseekV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads everything, so the refusal is the system's in form only."""
    save(model, tmp_path / "model")
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == SINGLE:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        load(tmp_path / "model")
    assert "the right to read" in str(caught.value.fix)
    assert SINGLE in str(caught.value.fix)


def test_strange_keys_are_named_once(
    model: DeepseekV3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(model, tmp_path / "model", dtype="fp8")
    changes = {"unsloth_version": "2025.3", "torchscript": False}
    edit_config(**changes)(tmp_path / "model")
    table = json.loads((tmp_path / "model" / "config.json").read_text())
    quantization = table["quantization_config"] | {"kernel": "cutlass", "ignored_layers": []}
    edit_config(quantization_config=quantization)(tmp_path / "model")
    load(tmp_path / "model")
    notes = [record.message for record in caplog.records if "unsloth_version" in record.message]
    assert len(notes) == 1
    assert "torchscript, unsloth_version, quantization_config.kernel" in notes[0]


def test_at_most_twenty_are_listed(model: DeepseekV3, tmp_path: Path) -> None:
    save(model, tmp_path)
    names = [name for name in load_file(tmp_path / SINGLE) if ".experts." in name]
    drop(*names)(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    lines = str(caught.value).splitlines()
    assert sum(line.startswith("  - missing") for line in lines) == 20
    assert f"and {len(names) - 20} more" in str(caught.value)


def test_a_table_for_each_layer_is_not_printed(tmp_path: Path) -> None:
    """As mlx's mixed quantisations have it: thousands of entries."""
    table = {f"model.layers.{layer_id}.mlp": {"bits": 4} for layer_id in range(1000)}
    with pytest.raises(CheckpointError, match="mlx") as caught:
        quantisation_of({"quantization": table}, tmp_path)
    assert "model.layers.0" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_no_folder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if kind == "file":
        path.write_bytes(b"GGUF")
    for reader in (load, load_config):
        with pytest.raises(CheckpointError, match=r"model\.gguf") as caught:
            reader(path)
        assert caught.value.fix


def test_unknown_dtypes(model: DeepseekV3, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    with pytest.raises(UsageError, match="fp8"):
        load(tmp_path / "model", dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="int8"):
        save(model, tmp_path / "new", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_shard_bytes"):
        save(model, tmp_path / "new", max_shard_bytes=0)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(model: DeepseekV3, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="not empty") as caught:
        save(model, tmp_path / "model")
    assert caught.value.fix
    with pytest.raises(UsageError, match="is a file"):
        save(model, tmp_path / "model" / SINGLE)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_fp8_cannot_hold_leaves_the_old_folder(bad: float, tmp_path: Path) -> None:
    model = build(CONFIG)
    save(model, tmp_path / "model")
    before = snapshot(tmp_path)
    with torch.no_grad():
        model.model.layers["1"].mlp.experts.down_proj[5, 3, 2] = bad
    with pytest.raises(CheckpointError, match=r"experts\.5\.down_proj") as caught:
        save(model, tmp_path / "model", dtype="fp8", replace=True)
    assert caught.value.fix
    assert snapshot(tmp_path) == before


def test_a_tokenizer_too_large(model: DeepseekV3, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text to train on"] * 20, 320)
    with pytest.raises(UsageError, match="more ids"):
        save(model, tmp_path / "model", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
