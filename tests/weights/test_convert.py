"""Conversions between float32, BF16 and FP8 folders. Oracles: what `save` writes of the same model,
byte for byte; a plain formula for FP8; transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import hf_oracle as oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import small
from rorqual import files
from rorqual.errors import RorqualError
from rorqual.model import ModelConfig
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.weights import load, load_config, save, values
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.convert.verify import verify
from rorqual.weights.folder import INDEX, SINGLE
from rorqual.weights.progress import byte_progress
from small import lively, random_tokens, relative_error

CONFIG = oracle.CONFIGS["mtp_groups_yarn"]
PROJECTION = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
SCALE = PROJECTION + "_scale_inv"
SHARD = 150_000
FLOAT32_TOLERANCE = 1e-5  # the same weights, sums in another order


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def run(source: Path, destination: Path, to: str, **options: object) -> None:
    convert(source, destination, Options(Target.parse(to), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [CONFIG, oracle.EDGES, oracle.CONFIGS["tied_mtp"]])
@pytest.mark.parametrize(
    ("before", "to", "after"),
    [
        ("float32", "bf16", "bfloat16"),
        ("float32", "fp8", "fp8"),
        ("float32", "float32", "float32"),
        ("bfloat16", "bf16", "bfloat16"),
        ("fp8", "fp8", "fp8"),
        ("fp8", "hf", "fp8"),
    ],
)
def test_the_files_are_those_that_save_writes(
    config: ModelConfig, before: str, to: str, after: str, tmp_path: Path
) -> None:
    model = lively(config)
    save(model, tmp_path / "before", before, max_shard_bytes=SHARD)  # type: ignore[arg-type]
    save(model, tmp_path / "wanted", after, max_shard_bytes=SHARD)  # type: ignore[arg-type]
    run(tmp_path / "before", tmp_path / "after", to, max_shard_bytes=SHARD)
    found, wanted = oracle.files_of(tmp_path / "after"), oracle.files_of(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_fp8_is_dequantised_by_the_plain_formula(dtype: str, tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "fp8", "fp8")
    run(tmp_path / "fp8", tmp_path / "wide", dtype)
    stored, found = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "wide")
    num_compared = 0
    for name, value in found.items():
        weight = stored[name]
        if weight.dtype == torch.float8_e4m3fn:
            scale = stored[name + "_scale_inv"]
            expected = torch.empty(weight.shape)
            for i in range(weight.shape[0]):
                row = scale[i // 128].repeat_interleave(128)[: weight.shape[1]]
                expected[i] = weight[i].float() * row
            assert torch.equal(value, expected.to(value.dtype)), name
            num_compared += 1
    assert num_compared > 20
    assert not any(name.endswith("_scale_inv") for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())


def test_bf16_is_quantised_by_the_reference_formula(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "bf16", "bfloat16")
    run(tmp_path / "bf16", tmp_path / "fp8", "fp8")
    before, after = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "fp8")
    assert after[PROJECTION].shape == (576, 192)
    assert after[SCALE].shape == (5, 2)
    for name, weight in after.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        expected, scale = quantise_blocks(before[name])
        assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(after[name + "_scale_inv"], scale), name
        amax = before[name][:128, :128].float().abs().max()
        # The fixed point of amax / 448 (ops/block_fp8) may be its neighbour.
        torch.testing.assert_close(scale[0, 0], amax / 448, rtol=2**-22, atol=0)
    table = json.loads((tmp_path / "fp8/config.json").read_text())
    assert table["quantization_config"]["weight_block_size"] == [128, 128]


def test_blocks_of_another_size_are_quantised_again_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of at least a block of either size. Oracle: the same in one piece."""
    save(lively(oracle.EDGES), tmp_path / "fp8", "fp8")
    tensors = load_file(tmp_path / "fp8" / SINGLE)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        num_blocks = -(-tensors[name.removesuffix("_scale_inv")].shape[0] // 64)
        tensors[name] = tensors[name].repeat_interleave(2, 0)[:num_blocks].contiguous()
    save_file(tensors, tmp_path / "fp8" / SINGLE)
    table = json.loads((tmp_path / "fp8/config.json").read_text())
    table["quantization_config"]["weight_block_size"] = [64, 128]
    (tmp_path / "fp8/config.json").write_text(json.dumps(table))
    run(tmp_path / "fp8", tmp_path / "whole", "fp8")
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 64 * 192)
    run(tmp_path / "fp8", tmp_path / "pieces", "fp8")
    assert oracle.files_of(tmp_path / "pieces") == oracle.files_of(tmp_path / "whole")
    assert tensors_of(tmp_path / "pieces")[SCALE].shape == (5, 2)


def test_a_system_that_takes_and_gives_a_few_bytes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux does beyond 2 GB, and network file systems at will. Oracle: whole reads."""
    save(lively(CONFIG), tmp_path / "a", "bfloat16")
    run(tmp_path / "a", tmp_path / "whole", "float32")
    read, write = files.read_at, files.write_at
    monkeypatch.setattr(files, "read_at", lambda to, data, at: read(to, data[:999], at))
    monkeypatch.setattr(files, "write_at", lambda to, data, at: write(to, data[:999], at))
    run(tmp_path / "a", tmp_path / "parts", "float32")
    assert oracle.files_of(tmp_path / "parts") == oracle.files_of(tmp_path / "whole")


def move_scales(folder: Path) -> None:
    """Puts the scales into the first shard, all else into the second."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    is_scale = {name: name.endswith("_scale_inv") for name in tensors}
    weight_map = {}
    for number, kind in ((1, True), (2, False)):
        part = {name: value for name, value in tensors.items() if is_scale[name] is kind}
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_scales_in_another_shard(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "fp8", "fp8")
    run(tmp_path / "fp8", tmp_path / "wanted", "bf16")
    move_scales(tmp_path / "fp8")
    run(tmp_path / "fp8", tmp_path / "found", "bf16")
    assert oracle.files_of(tmp_path / "found") == oracle.files_of(tmp_path / "wanted")


@pytest.mark.parametrize("stored", ["float32", "e8m0"])
def test_ue8m0_scales_are_read_and_kept(stored: str, tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "bf16", "bfloat16")
    run(tmp_path / "bf16", tmp_path / "fp8", "fp8", scale_format="ue8m0")
    tensors = tensors_of(tmp_path / "fp8")
    scales = {name: value for name, value in tensors.items() if name.endswith("_scale_inv")}
    for name, scale in scales.items():
        assert scale.dtype == torch.float32, name
        assert bool((torch.frexp(scale).mantissa == 0.5).all()), name
    table = json.loads((tmp_path / "fp8/config.json").read_text())
    assert table["quantization_config"]["scale_fmt"] == "ue8m0"
    if stored == "e8m0":
        tensors |= {name: scale.to(torch.float8_e8m0fnu) for name, scale in scales.items()}
        save_file(tensors, tmp_path / "fp8" / SINGLE, metadata={"format": "pt"})
    run(tmp_path / "fp8", tmp_path / "wide", "float32")
    wide = tensors_of(tmp_path / "wide")
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        assert torch.equal(wide[weight], dequantise_blocks(tensors[weight], scales[name])), weight
    run(tmp_path / "fp8", tmp_path / "again", "fp8")
    again = tensors_of(tmp_path / "again")
    for name, value in tensors.items():
        assert again[name].dtype == value.dtype, name
        assert torch.equal(again[name].view(torch.uint8), value.view(torch.uint8)), name
    assert json.loads((tmp_path / "again/config.json").read_text()) == table


def test_the_power_of_two_is_the_least_that_holds_the_block(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "bf16", "bfloat16")
    run(tmp_path / "bf16", tmp_path / "fp8", "fp8", scale_format="ue8m0")
    before, after = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "fp8")
    for name, weight in after.items():
        if weight.dtype == torch.float8_e4m3fn:
            amax = before[name][:128, :128].float().abs().max()
            scale = after[name + "_scale_inv"][0, 0]
            assert 448 * scale / 2 < amax <= 448 * scale, name


def test_a_missing_scale_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "fp8", "fp8")
    tensors = load_file(tmp_path / "fp8" / SINGLE)
    del tensors[SCALE]
    save_file(tensors, tmp_path / "fp8" / SINGLE)
    with pytest.raises(RorqualError, match="missing scale: " + SCALE.replace(".", r"\.")):
        run(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    assert not (tmp_path / "bf16").exists()


def test_values_that_fp8_cannot_hold_are_named(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "bf16", "bfloat16")
    tensors = load_file(tmp_path / "bf16" / SINGLE)
    tensors[PROJECTION][3, 3] = torch.inf
    save_file(tensors, tmp_path / "bf16" / SINGLE)
    with pytest.raises(RorqualError, match=PROJECTION.replace(".", r"\.")):
        run(tmp_path / "bf16", tmp_path / "fp8", "fp8")
    assert not (tmp_path / "fp8").exists()


def test_nan_stays_nan(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "fp8", "fp8")
    tensors = load_file(tmp_path / "fp8" / SINGLE)
    tensors[PROJECTION].view(torch.uint8)[1, 2] = 0x7F
    save_file(tensors, tmp_path / "fp8" / SINGLE)
    run(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    found = tensors_of(tmp_path / "bf16")[PROJECTION]
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    rows = verify(tmp_path / "fp8", tmp_path / "bf16", workers=1, progress=byte_progress)
    assert all(row.is_within_bound for row in rows)


def test_side_files_and_metadata(tmp_path: Path) -> None:
    tokenizer = small.tokenizer()
    config = CONFIG.with_changes(vocab_size=320)
    save(lively(config), tmp_path / "fp8", "fp8", tokenizer, generation={"temperature": 0.3})
    (tmp_path / "fp8/README.md").write_text("a card")
    (tmp_path / "fp8/.hidden").write_text("not the model's")
    (tmp_path / "fp8/pytorch_model.bin").write_text("other weights")
    run(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    before, after = oracle.files_of(tmp_path / "fp8"), oracle.files_of(tmp_path / "bf16")
    assert set(before) - set(after) == {".hidden", "pytorch_model.bin"}
    assert set(after) <= set(before)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert after[name] == before[name]
    with safe_open(tmp_path / "bf16" / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    table = json.loads(after["config.json"])
    assert table.pop("torch_dtype") == "bfloat16"
    wanted = json.loads(before["config.json"])
    del wanted["quantization_config"], wanted["torch_dtype"]
    assert table == wanted


def test_keys_of_the_config_that_we_do_not_read_survive(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "a", "fp8")
    file = tmp_path / "a/config.json"
    table = json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "x.Y"}, "dtype": "bfloat16"}
    file.write_text(json.dumps(table))
    run(tmp_path / "a", tmp_path / "b", "float32")
    found = json.loads((tmp_path / "b/config.json").read_text())
    assert found["auto_map"] == {"AutoConfig": "x.Y"}
    assert found["dtype"] == found["torch_dtype"] == "float32"


def test_mtp_is_kept_or_dropped(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "a", "bfloat16")
    run(tmp_path / "a", tmp_path / "kept", "hf")
    run(tmp_path / "a", tmp_path / "dropped", "hf", keep_mtp=False)
    assert load_config(tmp_path / "kept").num_nextn_predict_layers == 1
    assert load_config(tmp_path / "dropped").num_nextn_predict_layers == 0
    gone = set(tensors_of(tmp_path / "kept")) - set(tensors_of(tmp_path / "dropped"))
    prefix = f"model.layers.{CONFIG.num_hidden_layers}."
    assert gone == {name for name in tensors_of(tmp_path / "a") if name.startswith(prefix)}
    load(tmp_path / "dropped")


def test_a_config_that_names_absent_mtp_layers_is_corrected(tmp_path: Path) -> None:
    save(lively(CONFIG.with_changes(num_nextn_predict_layers=0)), tmp_path / "a", "bfloat16")
    file = tmp_path / "a/config.json"
    table = json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}
    file.write_text(json.dumps(table))
    run(tmp_path / "a", tmp_path / "b", "bf16")
    assert json.loads((tmp_path / "b/config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("name", ["base", "mtp_groups_yarn", "tied"])
def test_transformers_loads_what_was_fp8(name: str, tmp_path: Path) -> None:
    config = oracle.CONFIGS[name]
    save(lively(config), tmp_path / "fp8", "fp8", max_shard_bytes=SHARD)
    run(tmp_path / "fp8", tmp_path / "bf16", "bf16", max_shard_bytes=SHARD)
    theirs = oracle.read(tmp_path / "bf16")
    tokens = random_tokens(config, 2, 40)
    with torch.no_grad():
        ours = load(tmp_path / "bf16")(tokens)
        assert relative_error(theirs(tokens).logits, ours) < FLOAT32_TOLERANCE


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "a", "bfloat16", max_shard_bytes=SHARD)
    for workers in (1, 2, 5):
        options = Options(Target.parse("fp8"), max_shard_bytes=SHARD)
        convert(tmp_path / "a", tmp_path / str(workers), options, workers=workers)
    assert (
        oracle.files_of(tmp_path / "1")
        == oracle.files_of(tmp_path / "2")
        == oracle.files_of(tmp_path / "5")
    )


def test_verify_measures_the_error_of_each_type(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "a", "float32")
    run(tmp_path / "a", tmp_path / "b", "fp8")
    rows = verify(tmp_path / "a", tmp_path / "b", workers=2, progress=byte_progress)
    by_type = {row.type: row for row in rows}
    assert all(row.is_within_bound for row in rows)
    experts = by_type["mlp.experts.gate_proj"]
    num_sparse = CONFIG.num_layers_with_mtp - CONFIG.first_k_dense_replace
    assert experts.num_tensors == CONFIG.n_routed_experts * num_sparse
    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    names = [n for n in before if ".experts." in n and n.endswith("gate_proj.weight")]
    back = [dequantise_blocks(after[n], after[n + "_scale_inv"]) for n in names]
    difference = torch.cat([b - before[n] for n, b in zip(names, back, strict=True)])
    norm = torch.cat([before[n] for n in names]).norm()
    assert experts.relative_error == pytest.approx(float(difference.norm() / norm), rel=1e-5)
    assert experts.max_error == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert by_type["mlp.gate.e_score_correction_bias"].num_unequal == 0


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    save(lively(CONFIG), tmp_path / "a", "bfloat16")
    run(tmp_path / "a", tmp_path / "b", "hf")
    data = bytearray((tmp_path / "b" / SINGLE).read_bytes())
    data[-1] ^= 0x10
    (tmp_path / "b" / SINGLE).write_bytes(data)
    rows = verify(tmp_path / "a", tmp_path / "b", workers=1, progress=byte_progress)
    assert [row.num_unequal for row in rows if not row.is_within_bound] == [1]


@pytest.mark.parametrize("to", ["int4", "bf16:2", "shards", "shards:0", "shards:x", "gguf", ""])
def test_no_such_target(to: str) -> None:
    with pytest.raises(RorqualError, match="is no target"):
        Target.parse(to)


@pytest.mark.parametrize("name", ["mtp_groups_yarn", "tied_mtp"])
def test_gguf_there_and_back(name: str, tmp_path: Path) -> None:
    """BF16 in GGUF loses nothing, and shards can be made of it as of anything else."""
    config = oracle.CONFIGS[name]
    save(lively(config), tmp_path / "bf16", "bfloat16")
    run(tmp_path / "bf16", tmp_path / "model.gguf", "gguf:BF16")
    rows = verify(tmp_path / "bf16", tmp_path / "model.gguf", workers=1, progress=byte_progress)
    assert all(row.num_unequal == 0 for row in rows)
    with pytest.raises(RorqualError, match="already exists"):
        run(tmp_path / "bf16", tmp_path / "model.gguf", "gguf:BF16")
    run(tmp_path / "model.gguf", tmp_path / "back", "hf")
    before, after = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "back")
    copies = {n for n in before if n.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
    assert set(before) - set(after) <= copies - {"model.embed_tokens.weight"}
    for tensor_name, value in after.items():
        assert torch.equal(value, before[tensor_name]), tensor_name
    run(tmp_path / "model.gguf", tmp_path / "shards", "shards:2")
    first, second = load(tmp_path / "bf16"), load(tmp_path / "shards")
    names = second.state_dict()
    assert all(torch.equal(first.state_dict()[n], value) for n, value in names.items())


def test_fp8_straight_to_gguf(tmp_path: Path) -> None:
    save(lively(oracle.EDGES), tmp_path / "fp8", "fp8")
    run(tmp_path / "fp8", tmp_path / "model.gguf", "gguf:Q8_0")
    rows = verify(tmp_path / "fp8", tmp_path / "model.gguf", workers=1, progress=byte_progress)
    by_type = {row.type: row for row in rows}
    assert 0 < by_type["mlp.experts.up_proj"].relative_error < 0.01
    assert by_type["mlp.gate"].num_unequal == 0
