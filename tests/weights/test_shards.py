"""The demo's rank shards. Oracles: names and shapes written down by hand from the demo's parallel
layers (inference/model.py); equality of bits after the way back.
"""

from __future__ import annotations

import json
from pathlib import Path

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.errors import CheckpointError, ConfigError, RorqualError, UsageError
from rorqual.model import ModelConfig, YarnScaling, preset
from rorqual.weights import load, load_config, save
from rorqual.weights.checks import check_folder
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert
from rorqual.weights.open import kind_of
from rorqual.weights.shards.model_args import config_from_model_args, model_args, unsaid
from rorqual.weights.shards.names import check_world, shard_name
from small import lively

CONFIG = oracle.CONFIGS["mtp_groups_yarn"]
# Every cut of two ranks lies between FP8 blocks.
WIDE = oracle.WIDE.with_changes(moe_intermediate_size=256, num_nextn_predict_layers=1)
# The demo's config_671B.json.
RELEASED = """{
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61,
    "n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5,
    "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8"
}"""


def run(source: Path, destination: Path, to: str, keep_mtp: bool | None = None) -> None:
    convert(source, destination, Options(Target.parse(to), keep_mtp))


def test_names_and_parts_are_the_demos(tmp_path: Path) -> None:
    config = oracle.BASE  # D 64, 4 heads of 16 + 8 and 12, 8 experts
    save(lively(config), tmp_path / "hf", "bfloat16")
    run(tmp_path / "hf", tmp_path / "shards", "shards:2")
    found = {
        n: tuple(t.shape) for n, t in load_file(tmp_path / "shards/model1-mp2.safetensors").items()
    }
    attention = {
        "attn.wq_a.weight": (24, 64),
        "attn.q_norm.weight": (24,),
        "attn.wq_b.weight": (2 * 24, 24),
        "attn.wkv_a.weight": (24, 64),
        "attn.kv_norm.weight": (16,),
        "attn.wkv_b.weight": (2 * 28, 16),
        "attn.wo.weight": (64, 2 * 12),
        "attn_norm.weight": (64,),
        "ffn_norm.weight": (64,),
    }
    dense = {"ffn.w1.weight": (48, 64), "ffn.w2.weight": (64, 48), "ffn.w3.weight": (48, 64)}
    sparse = {
        "ffn.gate.weight": (8, 64),
        "ffn.gate.bias": (8,),
        "ffn.shared_experts.w1.weight": (16, 64),
        "ffn.shared_experts.w2.weight": (64, 16),
        "ffn.shared_experts.w3.weight": (16, 64),
    }
    for expert in (4, 5, 6, 7):  # the second rank's
        sparse[f"ffn.experts.{expert}.w1.weight"] = (32, 64)
        sparse[f"ffn.experts.{expert}.w2.weight"] = (64, 32)
        sparse[f"ffn.experts.{expert}.w3.weight"] = (32, 64)
    expected = {"embed.weight": (64, 64), "norm.weight": (64,), "head.weight": (64, 64)}
    for layer, ffn in enumerate((dense, sparse, sparse)):
        expected |= {f"layers.{layer}.{n}": shape for n, shape in (attention | ffn).items()}
    assert found == expected


def test_each_rank_has_its_slices(tmp_path: Path) -> None:
    save(lively(oracle.BASE), tmp_path / "hf", "bfloat16")
    run(tmp_path / "hf", tmp_path / "shards", "shards:4")
    whole = load_file(tmp_path / "hf/model.safetensors")
    name = "model.layers.1.self_attn."
    for rank in range(4):
        part = load_file(tmp_path / f"shards/model{rank}-mp4.safetensors")
        rows, columns = slice(rank * 24, rank * 24 + 24), slice(rank * 12, rank * 12 + 12)
        wq_b = part["layers.1.attn.wq_b.weight"]
        assert torch.equal(wq_b, whole[name + "q_b_proj.weight"][rows])
        assert torch.equal(
            part["layers.1.attn.wo.weight"], whole[name + "o_proj.weight"][:, columns]
        )
        assert torch.equal(
            part["layers.1.attn.wkv_a.weight"], whole[name + "kv_a_proj_with_mqa.weight"]
        )
        expert = part[f"layers.2.ffn.experts.{2 * rank + 1}.w2.weight"]
        assert torch.equal(
            expert, whole[f"model.layers.2.mlp.experts.{2 * rank + 1}.down_proj.weight"]
        )


@pytest.mark.parametrize(
    ("config", "dtype", "world"),
    [
        (CONFIG, "bfloat16", 1),
        (CONFIG, "bfloat16", 2),
        (CONFIG, "float32", 4),
        (WIDE, "fp8", 2),
        (WIDE, "fp8", 1),
        (CONFIG, "fp8", 1),
        (oracle.CONFIGS["tied_mtp"], "bfloat16", 2),
        (oracle.CONFIGS["v2_groups"], "bfloat16", 4),
        (oracle.CONFIGS["no_q_lora"], "bfloat16", 2),
    ],
)
def test_there_and_back_is_the_same(
    config: ModelConfig, dtype: str, world: int, tmp_path: Path
) -> None:
    save(lively(config), tmp_path / "hf", dtype)  # type: ignore[arg-type]
    run(tmp_path / "hf", tmp_path / "shards", f"shards:{world}", keep_mtp=True)
    assert kind_of(tmp_path / "shards") == "shards"
    assert load_config(tmp_path / "shards") == config
    run(tmp_path / "shards", tmp_path / "back", "hf")
    before, after = oracle.files_of(tmp_path / "hf"), oracle.files_of(tmp_path / "back")
    assert before == after
    oracle.assert_same(load(tmp_path / "shards"), load(tmp_path / "hf"))


def test_mtp_is_left_out_unless_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(lively(CONFIG), tmp_path / "hf", "bfloat16")
    run(tmp_path / "hf", tmp_path / "shards", "shards:2")
    assert "--keep-mtp" in caplog.text
    assert load(tmp_path / "shards").config.num_nextn_predict_layers == 0
    names = set(load_file(tmp_path / "shards/model0-mp2.safetensors"))
    assert not any(name.startswith("layers.3.") for name in names)
    run(tmp_path / "hf", tmp_path / "kept", "shards:2", keep_mtp=True)
    more = set(load_file(tmp_path / "kept/model0-mp2.safetensors")) - names
    assert {"layers.3.eh_proj.weight", "layers.3.shared_head.norm.weight"} <= more


def test_dtype_of_shards(tmp_path: Path) -> None:
    save(lively(WIDE), tmp_path / "fp8", "fp8")
    run(tmp_path / "fp8", tmp_path / "bf16", "shards:4:bf16")
    part = load_file(tmp_path / "bf16/model3-mp4.safetensors")
    assert {str(t.dtype) for n, t in part.items() if not n.endswith("bias")} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "bf16/model_args.json").read_text())["dtype"] == "bf16"
    run(tmp_path / "bf16", tmp_path / "again", "shards:2:fp8")
    part = load_file(tmp_path / "again/model1-mp2.safetensors")
    assert part["layers.0.attn.wo.scale"].shape == (2, 1)
    assert json.loads((tmp_path / "again/model_args.json").read_text())["dtype"] == "fp8"
    run(tmp_path / "fp8", tmp_path / "direct", "shards:2", keep_mtp=False)
    for rank in (0, 1):  # quantising what was rounded to BF16 finds the same blocks nearly always
        file = f"model{rank}-mp2.safetensors"
        assert set(load_file(tmp_path / "direct" / file)) == set(
            load_file(tmp_path / "again" / file)
        )


@pytest.mark.parametrize(
    ("config", "world", "is_fp8", "message"),
    [
        (oracle.BASE, 3, False, "cannot be divided among 3 ranks"),
        (oracle.BASE, 8, False, "num_attention_heads 4"),
        (WIDE, 4, True, "would cut a block of 128"),
        (preset("671b"), 32, True, "32 ranks would cut a block"),
    ],
)
def test_worlds_that_do_not_fit(
    config: ModelConfig, world: int, is_fp8: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_world(config, world, is_fp8=is_fp8)


def test_worlds_of_the_release() -> None:
    for world in (1, 2, 4, 8, 16):
        check_world(preset("671b"), world, is_fp8=True)
    check_world(preset("671b"), 32, is_fp8=False)
    with pytest.raises(UsageError, match=r"this many ranks: 1, 2, 4, 8, 16$"):
        check_world(preset("671b"), 3, is_fp8=True)


def test_the_demos_configuration_both_ways() -> None:
    table = json.loads(RELEASED)
    assert config_from_model_args(table) == preset("671b").with_changes(
        num_nextn_predict_layers=0, initializer_range=ModelConfig.initializer_range
    )
    ours = model_args(preset("671b"), "fp8")
    assert ours.items() >= table.items()
    assert unsaid(preset("671b")) == ["num_nextn_predict_layers"]
    for name in ("16b", "236b"):
        again = config_from_model_args(model_args(preset(name), "bf16"))
        assert again == preset(name).with_changes(initializer_range=again.initializer_range)
    plain = oracle.BASE.with_changes(initializer_range=0.006)
    assert config_from_model_args(model_args(plain, "bf16")) == plain
    assert "scale_fmt" in model_args(plain, "fp8", is_ue8m0=True)
    odd = plain.with_changes(
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        norm_topk_prob=False,
        rope_scaling=YarnScaling(
            factor=4, original_max_position_embeddings=16, mscale=0.5, mscale_all_dim=1.0
        ),
    )
    assert len(unsaid(odd)) == 5


def test_unknown_keys_of_the_demos_configuration() -> None:
    with pytest.raises(ConfigError, match="did you mean 'n_layers'"):
        config_from_model_args({"dim": 64, "n_layers": 2, "nlayers": 3})
    with pytest.raises(ConfigError, match="rope_factor is not a number"):
        config_from_model_args({"dim": 64, "n_layers": 2, "rope_factor": "forty"})


def shards(tmp_path: Path, world: int = 2) -> Path:
    save(lively(oracle.BASE), tmp_path / "hf", "bfloat16")
    run(tmp_path / "hf", tmp_path / "shards", f"shards:{world}")
    return tmp_path / "shards"


@pytest.mark.parametrize("name", ["config.json", "model_args.json"])
def test_a_folder_with_only_the_demos_configuration(name: str, tmp_path: Path) -> None:
    folder = shards(tmp_path)
    args = (folder / "model_args.json").read_text()
    (folder / "config.json").unlink()
    (folder / "model_args.json").unlink()
    with pytest.raises(CheckpointError, match="without a configuration"):
        load(folder)
    (folder / name).write_text(args)
    oracle.assert_same(load(folder), load(tmp_path / "hf"))


def test_names_of_files_decide_nothing(tmp_path: Path) -> None:
    folder = shards(tmp_path, world=4)
    for rank, name in enumerate(("c", "a", "d", "b")):
        (folder / f"model{rank}-mp4.safetensors").rename(folder / f"{name}.weights")
    assert kind_of(folder) == "shards"
    oracle.assert_same(load(folder), load(tmp_path / "hf"))


def test_broken_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    first, second = folder / "model0-mp2.safetensors", folder / "model1-mp2.safetensors"
    kept = second.read_bytes()

    def message() -> str:
        with pytest.raises(RorqualError) as problem:
            load(folder)
        second.write_bytes(kept)
        return str(problem.value)

    second.unlink()
    assert "no such file: model1-mp2.safetensors" in message()
    tensors = load_file(second)
    save_file({n: t for n, t in tensors.items() if n != "norm.weight"}, second)
    assert "missing: norm.weight in model1-mp2.safetensors" in message()
    save_file(tensors | {"layers.0.ffn.w9.weight": torch.ones(2, 2)}, second)
    assert "unexpected: layers.0.ffn.w9.weight" in message()
    save_file(tensors | {"layers.0.attn.wo.weight": torch.ones(64, 10)}, second)
    assert "the ranks differ: layers.0.attn.wo.weight" in message()
    save_file({n: t for n, t in tensors.items() if "experts.5.w1" not in n}, second)
    assert "missing: model.layers.1.mlp.experts.5.gate_proj.weight" in message()
    second.write_bytes(kept[: len(kept) // 2])
    assert "is not a whole safetensors file" in message()
    second.write_bytes(first.read_bytes())
    assert "contradicts the experts" in message()


def test_two_kinds_in_one_folder(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    (folder / "model.safetensors").write_bytes((tmp_path / "hf/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="both rank shards and a Hugging Face"):
        load(folder)


def test_inspect_reads_shards(tmp_path: Path) -> None:
    found = check_folder(shards(tmp_path), is_deep=True)
    assert all(check.status != "failed" for check in found.checks), found.checks


def test_names_of_the_release() -> None:
    assert (
        shard_name("model.layers.3.self_attn.kv_b_proj.weight_scale_inv")
        == "layers.3.attn.wkv_b.scale"
    )
    assert (
        shard_name("model.layers.60.mlp.gate.e_score_correction_bias") == "layers.60.ffn.gate.bias"
    )
    assert shard_name("lm_head.weight") == "head.weight"
    assert shard_name("model.layers.9.mlp.experts.255.down_proj.weight_scale_inv") == (
        "layers.9.ffn.experts.255.w2.scale"
    )


def test_parts_that_cannot_be_put_together(tmp_path: Path) -> None:
    """FP8 in 48 rows a rank, so that a block's scale would be two ranks'; a matrix without columns;
    files that neither experts nor names tell apart.
    """
    folder = shards(tmp_path)
    files = [folder / f"model{rank}-mp2.safetensors" for rank in (0, 1)]
    kept = [load_file(file) for file in files]

    def message(changes: dict[str, torch.Tensor]) -> str:
        for file, tensors in zip(files, kept, strict=True):
            save_file(tensors | changes, file)
        with pytest.raises(RorqualError) as problem:
            load(folder)
        return str(problem.value)

    name = "layers.0.attn.wq_b"
    weight = {f"{name}.weight": torch.zeros(48, 24).to(torch.float8_e4m3fn)}
    said = message(weight | {f"{name}.scale": torch.ones(1, 1)})
    assert f"cut FP8 blocks: {name}.weight has 48 rows a rank, no multiple of 128" in said
    said = message({"layers.0.attn.wo.weight": torch.zeros(64)})
    assert "wrong shape: layers.0.attn.wo.weight is [64]" in said
    for rank, (file, tensors) in enumerate(zip(files, kept, strict=True)):
        save_file({n: t for n, t in tensors.items() if ".experts." not in n}, file)
        file.rename(folder / f"{'ab'[rank]}.safetensors")
    with pytest.raises(CheckpointError, match=r"the rank of a\.safetensors cannot be told"):
        load(folder)


def test_ranks_of_another_world(tmp_path: Path) -> None:
    """Three files of a model of eight experts, or of two worlds, are no whole."""
    folder = shards(tmp_path, world=4)
    (folder / "model3-mp4.safetensors").rename(folder / "model3-mp8.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together") as caught:
        load(folder)
    assert "N dividing 8" in str(caught.value.expected)
    (folder / "model3-mp8.safetensors").unlink()
    for rank in range(3):
        (folder / f"model{rank}-mp4.safetensors").rename(folder / f"{rank}.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(folder)
