"""What a conversion plans and says of itself in config.json. Oracles: tables by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.errors import UsageError
from rorqual.model import build
from rorqual.weights import load, save
from rorqual.weights.convert.plan import MAX_SHARD_BYTES, Options, Target, plan_files
from rorqual.weights.convert.run import Conversion, convert
from rorqual.weights.folder import SINGLE
from rorqual.weights.names import tensors_of
from rorqual.weights.open import open_source

CONFIG = oracle.CONFIGS["mtp"]
PROJECTION = "model.layers.0.self_attn.o_proj.weight"


def run(source: Path, destination: Path, to: str, **options: Any) -> Conversion:
    return convert(source, destination, Options(Target.parse(to), **options), workers=1)


def saved(path: Path, dtype: Any = "bfloat16", **changes: Any) -> Path:
    save(build(CONFIG), path, dtype)
    return edit(path, **changes)


def edit(path: Path, **changes: Any) -> Path:
    table = table_of(path) | changes
    (path / "config.json").write_text(json.dumps(table))
    return path


def table_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_targets_are_taken_apart() -> None:
    parse = Target.parse
    assert parse("hf") == Target("huggingface")
    assert parse("float32") == Target("huggingface", "float32")
    assert parse("shards:1") == Target("shards", None, 1)
    assert parse("shards:16:fp8") == Target("shards", "fp8", 16)
    assert parse("shards:999999:float32") == Target("shards", "float32", 999_999)
    assert parse("gguf:Q4_K_M") == Target("gguf", mix="Q4_K_M")
    for wrong in ("hf:2", "shards:1000000", "shards:2:int8", "shards:-1", "gguf:", "fp8:1"):
        with pytest.raises(UsageError, match="is no target"):
            parse(wrong)


def test_what_is_not_asked_for() -> None:
    assert Options(Target.parse("hf")).shard_bytes == MAX_SHARD_BYTES == 5e9
    assert Options(Target.parse("hf"), max_shard_bytes=7).shard_bytes == 7
    assert Options(Target.parse("gguf:F32")).is_mtp_kept
    assert not Options(Target.parse("shards:2")).is_mtp_kept
    assert Options(Target.parse("shards:2"), keep_mtp=True).is_mtp_kept
    assert not Options(Target.parse("hf"), keep_mtp=False).is_mtp_kept


@pytest.mark.parametrize(
    ("before", "to", "main"),
    [
        ("bfloat16", "hf", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "hf", "float32"),
        ("float32", "bf16", "bfloat16"),
        ("float32", "fp8", "bfloat16"),
        ("fp8", "hf", "bfloat16"),
    ],
)
def test_the_dtype_that_config_json_names(before: str, to: str, main: str, tmp_path: Path) -> None:
    """The router's bias is float32 in all of them. transformers 5 has the key without `torch_`."""
    source = edit(saved(tmp_path / "a", before), dtype="none")
    run(source, tmp_path / "b", to)
    found = table_of(tmp_path / "b")
    assert found["torch_dtype"] == found["dtype"] == main


def test_one_tensor_of_float16_makes_it_float16(tmp_path: Path) -> None:
    source = saved(tmp_path / "a")
    tensors = load_file(source / SINGLE)
    tensors[PROJECTION] = tensors[PROJECTION].half()
    save_file(tensors, source / SINGLE)
    run(source, tmp_path / "b", "hf")
    assert table_of(tmp_path / "b")["torch_dtype"] == "float16"
    assert "dtype" not in table_of(tmp_path / "b")
    assert load_file(tmp_path / "b" / SINGLE)[PROJECTION].dtype == torch.float16
    run(source, tmp_path / "c", "bf16")
    assert table_of(tmp_path / "c")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("keep_mtp", "num"), [(None, 1), (False, 0)])
def test_both_names_of_the_number_of_mtp_layers(
    keep_mtp: bool | None, num: int, tmp_path: Path
) -> None:
    source = saved(tmp_path / "a", num_mtp_layers=1)
    notes = run(source, tmp_path / "b", "hf", keep_mtp=keep_mtp).notes
    found = table_of(tmp_path / "b")
    assert (found["num_nextn_predict_layers"], found["num_mtp_layers"]) == (num, num)
    assert notes == ([] if num else ["the MTP layer is left out"])
    assert load(tmp_path / "b").config.num_nextn_predict_layers == num
    edit(source, num_nextn_predict_layers=None)
    run(source, tmp_path / "c", "hf", keep_mtp=keep_mtp)
    found = table_of(tmp_path / "c")
    assert found["num_mtp_layers"] == num
    assert found.get("num_nextn_predict_layers") in ((num,) if num else (None, 0))


def test_how_blocks_were_quantised_stays_said_where_they_stay(tmp_path: Path) -> None:
    """Kept blocks keep their table; new ones get ours; the form of the scales is told anew."""
    source = saved(tmp_path / "a", "fp8")
    table = table_of(source)["quantization_config"]
    own = table | {"modules_to_not_convert": ["lm_head"], "scale_fmt": "ue8m0"}
    edit(source, quantization_config=own)
    run(source, tmp_path / "kept", "hf")
    assert table_of(tmp_path / "kept")["quantization_config"] == own
    run(source, tmp_path / "float32", "hf", scale_format="float32")
    del own["scale_fmt"]
    assert table_of(tmp_path / "float32")["quantization_config"] == own
    run(source, tmp_path / "new", "fp8", scale_format="float32")
    assert table_of(tmp_path / "new")["quantization_config"] == table
    run(source, tmp_path / "powers", "fp8")
    assert table_of(tmp_path / "powers")["quantization_config"] == table | {"scale_fmt": "ue8m0"}
    args = [("shards:1", "ue8m0", "fp8"), ("shards:1:bf16", None, "bf16")]
    for to, scale_format, dtype in args:
        folder = tmp_path / dtype
        run(source, folder, to)
        found = json.loads((folder / "model_args.json").read_text())
        assert (found.get("scale_fmt"), found["dtype"]) == (scale_format, dtype)


def test_the_demo_is_told_what_it_has_no_field_for(tmp_path: Path) -> None:
    source = saved(tmp_path / "a")
    first, second = run(source, tmp_path / "b", "shards:2").notes
    assert first == "the MTP layer is left out; --keep-mtp keeps it"
    assert "no field for hidden_size other than 7168 with a router bias:" in second
    (first,) = run(source, tmp_path / "c", "shards:2", keep_mtp=True).notes
    assert "num_nextn_predict_layers" not in first


def test_shards_of_other_blocks_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", "fp8")
    quantisation = table_of(source)["quantization_config"] | {"weight_block_size": [256, 128]}
    edit(source, quantization_config=quantisation)
    with pytest.raises(UsageError, match="128x128 only") as caught:
        run(source, tmp_path / "b", "shards:1")
    assert "[256, 128]" in str(caught.value.found)
    assert "shards:1:fp8 or shards:1:bf16" in str(caught.value.fix)
    run(source, tmp_path / "b", "shards:1:fp8")
    run(source, tmp_path / "c", "shards:1:bf16")


def test_a_tied_head_of_another_format_is_not_repeated(tmp_path: Path) -> None:
    """The demo always has a head of its own, made of the embedding; our folders have none."""
    config = oracle.CONFIGS["tied"]
    save(build(config), tmp_path / "a", "bfloat16")
    run(tmp_path / "a", tmp_path / "shards", "shards:2")
    tensors = load_file(tmp_path / "shards/model1-mp2.safetensors")
    assert torch.equal(tensors["head.weight"], tensors["embed.weight"])
    run(tmp_path / "shards", tmp_path / "b", "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / SINGLE)
    with open_source(tmp_path / "b") as source:
        (file,) = plan_files(
            source,
            [t for t in tensors_of(config) if t.name in source.entries],
            config,
            Options(Target.parse("hf")),
        )
    assert file.name == SINGLE
    assert file.num_bytes == sum(t.nbytes for t in load_file(tmp_path / "b" / SINGLE).values())


def test_sizes_of_shards_are_limits_of_their_tensors(tmp_path: Path) -> None:
    """A file whose tensors have just the limit's bytes is one file; a byte less makes two."""
    source = saved(tmp_path / "a")
    total = sum(tensor.nbytes for tensor in load_file(source / SINGLE).values())
    assert run(source, tmp_path / "b", "hf", max_shard_bytes=total).files == [SINGLE]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert run(source, tmp_path / "c", "hf", max_shard_bytes=total - 1).files == names
    index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert not (tmp_path / "b/model.safetensors.index.json").exists()
