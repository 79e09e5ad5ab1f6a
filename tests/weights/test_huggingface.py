"""Reading and writing by ourselves. Oracle: equality, of values and of the files' bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.model import ModelConfig
from rorqual.tokenizer import train_tokenizer
from rorqual.weights import load, load_config, save
from rorqual.weights.folder import INDEX, SINGLE, open_folder
from rorqual.weights.fp8 import Format
from rorqual.weights.planned import cut_files, planned_tensors
from small import lively

CONFIG = oracle.CONFIGS["mtp_groups_yarn"]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrites the single file of a checkpoint."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("config", [CONFIG, oracle.EDGES, oracle.CONFIGS["tied_mtp"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_round_trip_is_bit_exact(config: ModelConfig, dtype: Format, tmp_path: Path) -> None:
    model = lively(config)
    save(model, tmp_path / "a", dtype, max_shard_bytes=150_000)
    first = load(tmp_path / "a")
    if dtype == "float32":
        oracle.assert_same(model, first)
    save(first, tmp_path / "b", dtype, max_shard_bytes=150_000)
    oracle.assert_same(first, load(tmp_path / "b"))
    assert oracle.files_of(tmp_path / "a") == oracle.files_of(tmp_path / "b")
    assert load_config(tmp_path / "a") == config


def test_bfloat16_model_round_trip(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "a", "bfloat16")
    model = load(tmp_path / "a", dtype="bfloat16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
    for router in model.routers():
        assert router.e_score_correction_bias.dtype == torch.float32
    save(model, tmp_path / "b", "bfloat16")
    assert oracle.files_of(tmp_path / "a") == oracle.files_of(tmp_path / "b")


def test_shards_and_index(tmp_path: Path) -> None:
    limit = 100_000
    save(lively(CONFIG), tmp_path, "bfloat16", max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    names = {tensor.name for tensor in planned_tensors(CONFIG, "bfloat16")}
    assert index["weight_map"].keys() == names
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    total = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [t.nbytes for t in load_file(file).values()]
        assert sum(sizes) <= limit
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert not (tmp_path / SINGLE).exists()


def test_a_scale_stays_with_its_weight_and_large_tensors_stand_alone() -> None:
    shards = cut_files(planned_tensors(oracle.EDGES, "fp8"), 1)
    assert [tensor for shard in shards for tensor in shard] == planned_tensors(oracle.EDGES, "fp8")
    for shard in shards:
        assert [t.role for t in shard[1:]] == (["scale"] if shard[0].dtype == "F8_E4M3" else [])


def test_weight_and_scale_in_different_shards(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path, "fp8")
    expected = load(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    scales = {name: value for name, value in tensors.items() if name.endswith("_scale_inv")}
    rest = {name: value for name, value in tensors.items() if name not in scales}
    save_file(scales, tmp_path / "a.safetensors")
    save_file(rest, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(scales, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    oracle.assert_same(expected, load(tmp_path))


def test_ue8m0_scales(tmp_path: Path) -> None:
    """V3.1's form: powers of two, as float8_e8m0fnu or in float32, read alike."""
    save(lively(oracle.EDGES), tmp_path / "a", "fp8")
    save(lively(oracle.EDGES), tmp_path / "b", "fp8")

    def to_powers(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = torch.exp2(torch.ceil(torch.log2(tensors[name]))).to(dtype)

    edit(tmp_path / "a", lambda tensors: to_powers(tensors, torch.float8_e8m0fnu))
    edit(tmp_path / "b", lambda tensors: to_powers(tensors, torch.float32))
    model = load(tmp_path / "a")
    oracle.assert_same(model, load(tmp_path / "b"))
    # Other scales may be found on saving again, but the values they stand for are the same.
    save(model, tmp_path / "c", "fp8")
    oracle.assert_same(model, load(tmp_path / "c"))


@pytest.mark.parametrize(("block", "dim"), [([64, 128], 0), ([128, 64], 1)])
def test_a_block_is_rows_times_columns(block: list[int], dim: int, tmp_path: Path) -> None:
    """Blocks of half the size, each with the scale that the whole block had."""
    save(lively(oracle.EDGES), tmp_path, "fp8")
    expected = load(tmp_path)

    def halve_blocks(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            num_blocks = -(-tensors[name.removesuffix("_scale_inv")].shape[dim] // 64)
            finer = tensors[name].repeat_interleave(2, dim).narrow(dim, 0, num_blocks)
            tensors[name] = finer.contiguous()

    edit(tmp_path, halve_blocks)
    table = json.loads((tmp_path / "config.json").read_text())
    table["quantization_config"]["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps(table))
    oracle.assert_same(load(tmp_path), expected)


def test_copies_are_optional_and_the_tied_head_too(tmp_path: Path) -> None:
    for name in ("tied_mtp", "mtp"):
        model = lively(oracle.CONFIGS[name])
        save(model, tmp_path / name, repeat_mtp_embedding=False)
        oracle.assert_same(model, load(tmp_path / name))
    model = lively(oracle.CONFIGS["tied_mtp"])
    head = model.model.embed_tokens.weight.detach().clone()
    edit(tmp_path / "tied_mtp", lambda tensors: tensors.update({"lm_head.weight": head}))
    oracle.assert_same(model, load(tmp_path / "tied_mtp"))


def test_known_leftovers_are_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """inv_freq buffers, float16, a stale quantization_config, and stale MTP copies."""
    model = lively(oracle.CONFIGS["mtp"])
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        tensors["model.layers.3.embed_tokens.weight"] += 1

    edit(tmp_path, change)
    loaded = load(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert "quantization_config" in caplog.text
    assert "model.layers.3.embed_tokens.weight differs" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
def test_copies_that_are_none_are_said_however_the_weights_run(
    dtype: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stale copy of an MTP layer with a warning; a head that only seems tied is refused."""
    model = lively(oracle.CONFIGS["tied_mtp"])
    head = model.model.embed_tokens.weight.detach().clone()
    number = model.config.num_hidden_layers
    stale = {f"model.layers.{number}.embed_tokens.weight": head + 1}
    for name, more in (("true", {"lm_head.weight": head}), ("false", {"lm_head.weight": head + 1})):
        save(model, tmp_path / name)
        edit(tmp_path / name, lambda tensors, more=more: tensors.update(more | stale))
    load(tmp_path / "true", dtype)
    assert f"model.layers.{number}.embed_tokens.weight differs" in caplog.text
    assert "lm_head.weight differs" not in caplog.text
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load(tmp_path / "false", dtype)


def test_a_model_without_its_mtp_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What transformers writes: the config names an MTP layer, the file has none."""
    theirs = oracle.make(oracle.CONFIGS["mtp"])
    theirs.save_pretrained(tmp_path)
    assert load(tmp_path).config.num_nextn_predict_layers == 0
    assert "loaded without MTP" in caplog.text


def test_settings_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one small text, and another"] * 20, 320)
    model = lively(oracle.BASE.with_changes(vocab_size=tokenizer.vocab_size + 8))
    save(model, tmp_path, "fp8", tokenizer, generation={"temperature": 0.3})
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["torch_dtype"] == "bfloat16"
    for table in (config, generation):
        assert table["bos_token_id"] == tokenizer.bos_id
        assert table["eos_token_id"] == tokenizer.eos_id
    assert generation["temperature"] == 0.3
    from transformers import AutoTokenizer

    text = "one small text"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer.encode(text)


def test_only_headers_are_read_to_open(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path)
    with open_folder(tmp_path) as folder:
        assert folder.num_bytes() == sum(t.num_bytes for t in planned_tensors(CONFIG, "float32"))


def test_replace(tmp_path: Path) -> None:
    first, second = lively(oracle.BASE), lively(oracle.CONFIGS["groups"])
    save(first, tmp_path / "model")
    save(second, tmp_path / "model", replace=True)
    assert load(tmp_path / "model").config == second.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
