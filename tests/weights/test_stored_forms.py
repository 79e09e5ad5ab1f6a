"""Forms of a stored model. Oracle: the same checkpoint loaded as float32 and bfloat16."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import hf_oracle as oracle
import pytest
import torch
from test_gguf import WIDE
from test_stored import checkpoint, median_error, needs_native

from rorqual.errors import RorqualError, UsageError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.stored import StoredEmbedding, StoredStack
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.ops.kernels import FP8
from rorqual.ops.quantise import decode_blocks, encode_blocks
from rorqual.weights import load, stored_reader
from rorqual.weights.forms import FORMS, made, note_of
from rorqual.weights.source import StoredBytes

SOURCES = ("float32", "bfloat16", "fp8", "gguf:F16", "gguf:Q8_0", "gguf:Q4_K_M", "gguf:Q5_K_M")


@pytest.mark.parametrize(
    ("form", "stored", "columns", "runs"),
    [
        ("stored", "Q5_0", 32, "Q5_0"),
        ("stored", "F32", 7, "F32"),
        ("stored", FP8, 7, FP8),
        ("native", "BF16", 7, "BF16"),
        ("native", "Q8_0", 32, "Q8_0"),
        ("native", "Q4_K", 256, "Q4_K"),
        ("native", "Q6_K", 256, "Q6_K"),
        ("native", "Q3_K", 256, "BF16"),
        ("native", "F16", 31, "BF16"),
        ("native", "F32", 32, "BF16"),
        ("native", FP8, 32, "BF16"),
        ("native", "Q4_0", 32, "Q8_0"),
        ("native", "Q5_0", 64, "Q8_0"),
        ("native", "Q5_1", 64, "BF16"),
        ("int8", "BF16", 64, "Q8_0"),
        ("int8", "F32", 32, "Q8_0"),
        ("int8", FP8, 96, "Q8_0"),
        ("int8", "Q5_0", 32, "Q8_0"),
        ("int8", "BF16", 48, "BF16"),
        ("int8", "F32", 31, "BF16"),
        ("int8", "Q8_0", 32, "Q8_0"),
        ("int8", "Q4_K", 256, "Q4_K"),
        ("int8", "Q6_K", 256, "Q6_K"),
    ],
)
def test_what_becomes_of_a_matrix(form: str, stored: str, columns: int, runs: str) -> None:
    assert FORMS[form].kind_of(stored, columns) == runs


def stacks_of(model: DeepseekV3) -> dict[str, StoredStack]:
    return {n: m for n, m in model.named_modules() if isinstance(m, StoredStack)}


@pytest.mark.parametrize("source", SOURCES)
def test_native_is_as_stored_or_what_bfloat16_makes_of_it(source: str, tmp_path: Path) -> None:
    path = checkpoint(source, WIDE, tmp_path)
    stored = stacks_of(load(path, "stored", kernels="decoded"))
    found = stacks_of(load(path, "native", kernels="decoded"))
    assert found.keys() == stored.keys()
    for name, stack in found.items():
        before = stored[name]
        for index in range(stack.shape[0]):
            values = before.dense(index)
            is_kept = before.kind in ("BF16", "Q8_0", "Q4_K", "Q6_K") or "embed" in name
            is_same = is_kept or before.kind in ("Q4_0", "Q5_0")
            assert stack.kind == (before.kind if is_kept else "Q8_0" if is_same else "BF16")
            expected = values if is_same else values.bfloat16().float()
            assert torch.equal(stack.dense(index), expected), name


@pytest.mark.parametrize("source", ["bfloat16", "fp8", "gguf:Q5_K_M"])
def test_int8_is_what_ggufs_encoder_makes_of_the_values(source: str, tmp_path: Path) -> None:
    path = checkpoint(source, WIDE, tmp_path)
    stored = stacks_of(load(path, "stored", kernels="decoded"))
    found = stacks_of(load(path, "int8", kernels="decoded"))
    kinds = {stack.kind for name, stack in found.items() if "embed" not in name}
    assert "Q8_0" in kinds
    assert kinds <= {"Q8_0", "Q4_K", "Q6_K"}
    for name, stack in found.items():
        if stack.kind != "Q8_0" or stored[name].kind == "Q8_0":
            continue
        exact = stored[name].dense(0)
        raw = gguf.quantize(exact.numpy(), gguf.GGMLQuantizationType.Q8_0)
        expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
        step = exact.unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, 1) / 127
        error, least = (stack.dense(0) - exact).abs(), (expected - exact).abs()
        assert bool((error <= 0.57 * step).all()), (
            "half a step, and 127 times what float16 rounds of it"
        )
        assert float(error.square().sum()) <= 1.001 * float(least.square().sum()), name


@needs_native
@pytest.mark.parametrize(
    ("form", "source", "close"),
    [("native", "fp8", 2e-2), ("native", "gguf:Q5_K_M", 2e-2), ("int8", "bfloat16", 5e-2)],
)
@torch.no_grad()
def test_logits_are_near_those_of_the_decoded_weights(
    form: str, source: str, close: float, tmp_path: Path
) -> None:
    path = checkpoint(source, WIDE, tmp_path)
    model = load(path, form)  # type: ignore[arg-type]
    assert all(s.packed_EP is not None for n, s in stacks_of(model).items() if "embed" not in n)
    ids = torch.arange(2 * 23).reshape(2, 23) % WIDE.vocab_size
    assert median_error(model(ids), load(path, "float32")(ids)) < close


@pytest.mark.parametrize("form", ["native", "int8"])
@torch.no_grad()
def test_a_tied_embedding_is_packed_and_looked_up(form: str, tmp_path: Path) -> None:
    config = oracle.CONFIGS["tied_mtp"]
    path = checkpoint("float32", config, tmp_path)
    model, exact = load(path, form), load(path, "float32")  # type: ignore[arg-type]
    embedding = model.model.embed_tokens
    assert isinstance(embedding, StoredEmbedding)
    assert embedding.stack is model.lm_head.stack  # type: ignore[union-attr]
    assert embedding.stack.kind == FORMS[form].kind_of("F32", config.hidden_size)
    ids = torch.tensor([[5, 0, config.vocab_size - 1, 5]])
    assert torch.equal(embedding(ids), embedding.stack.dense(0)[ids])
    found, expected = embedding(ids), exact.model.embed_tokens(ids)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert median_error(model(ids), exact(ids)) < 5e-2


def test_an_embedding_stays_as_it_is_stored(tmp_path: Path) -> None:
    path = checkpoint("float32", WIDE, tmp_path)
    for form in ("native", "int8"):
        model = load(path, form)  # type: ignore[arg-type]
        assert model.model.embed_tokens.stack.kind == "F32"  # type: ignore[union-attr]


def narrow() -> ModelConfig:
    """Experts' inner width is no whole block of 32."""
    return WIDE.with_changes(moe_intermediate_size=48)


def test_one_note_says_what_was_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model; of a small one only those see it who want to see all."""
    path = checkpoint("bfloat16", narrow(), tmp_path)
    for level, num_notes in (("INFO", 0), ("DEBUG", 1)):
        with caplog.at_level(level, logger="rorqual.weights"):
            load(path, "int8")
        assert len(caplog.records) == num_notes
        caplog.clear()
    monkeypatch.setattr(stored_reader, "NOTED_BYTES", 0)
    with caplog.at_level("INFO", logger="rorqual.weights"):
        load(path, "native")
        assert not caplog.records, "all is bfloat16 already"
        model = load(path, "int8")
    (note,) = caplog.records
    stacks = stacks_of(model)
    num = sum(s.shape[0] for n, s in stacks.items() if s.kind == "Q8_0")
    num_down = sum(s.shape[0] for n, s in stacks.items() if n.endswith("experts.down"))
    shared = sum("shared_experts.down" in n for n in stacks)
    assert note.getMessage() == (
        f"{path}: matrices run as Q8_0: {num:,} of BF16; matrices run as BF16, since their rows "
        f"are no whole blocks of Q8_0: {num_down + shared:,} of BF16 (dtype int8)"
    )
    kinds = {n: s.kind for n, s in stacks.items() if ".down" in n and "mlp.down" not in n}
    assert set(kinds.values()) == {"BF16"}


def test_a_note_counts_by_kind() -> None:
    changes = Counter({("F32", "BF16"): 2, (FP8, "BF16"): 1200})
    assert note_of(FORMS["native"], changes) == (
        "matrices run as BF16: 2 of F32, 1,200 of F8_E4M3 (dtype native)"
    )
    both = Counter({(FP8, "Q8_0"): 5, (FP8, "BF16"): 3, ("BF16", "BF16"): 1})
    assert note_of(FORMS["int8"], both) == (
        "matrices run as Q8_0: 5 of F8_E4M3; matrices run as BF16, since their rows are no whole "
        "blocks of Q8_0: 1 of BF16, 3 of F8_E4M3 (dtype int8)"
    )
    assert note_of(FORMS["native"], Counter()) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0"])
def test_narrow_blocks_with_one_scale_keep_their_values(kind: str) -> None:
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    values[0] = 0
    codes = encode_blocks(values, kind)
    found = made(StoredBytes(kind, codes), "Q8_0")
    assert found.kind == "Q8_0"
    assert torch.equal(decode_blocks(found.codes_RB, "Q8_0"), decode_blocks(codes, kind))
    changes = Counter({(kind, "Q8_0"): 3, ("F16", "BF16"): 1})
    assert note_of(FORMS["native"], changes) == (
        "matrices run as BF16: 1 of F16; matrices run as Q8_0, with the same values: "
        f"3 of {kind} (dtype native)"
    )


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_pieces_begin_with_a_block_of_scales(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces; a last block that is not full."""
    from rorqual.weights import forms

    monkeypatch.setattr(forms, "PIECE_VALUES", 96 * 50)
    values = torch.randn(100, 96, generator=torch.Generator().manual_seed(1))
    codes, scales = quantise_blocks(values, 32)
    found = made(StoredBytes(FP8, codes.view(torch.uint8), scales, (32, 32)), kind)
    exact = dequantise_blocks(codes, scales, block=(32, 32))
    assert found.kind == kind
    assert torch.equal(found.codes_RB, encode_blocks(exact, kind))
    raw = encode_blocks(values, "F16")
    found = made(StoredBytes("F16", raw), kind)
    assert torch.equal(found.codes_RB, encode_blocks(decode_blocks(raw, "F16"), kind))


def test_a_weight_that_int8_cannot_hold_is_named(tmp_path: Path) -> None:
    from rorqual.weights import save
    from small import lively

    model = lively(WIDE)
    with torch.no_grad():
        model.model.layers["0"].self_attn.o_proj.weight[3, 4] = torch.nan
    save(model, tmp_path / "hf", "bfloat16")
    load(tmp_path / "hf", "native")
    with pytest.raises(RorqualError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight"):
        load(tmp_path / "hf", "int8")


def test_forms_are_for_cpus(tmp_path: Path) -> None:
    path = checkpoint("bfloat16", WIDE, tmp_path)
    for form in FORMS:
        with pytest.raises(UsageError, match="on the CPU only"):
            load(path, form, torch.device("meta"))  # type: ignore[arg-type]


def test_without_the_library_it_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rorqual.ops import kernels, packed
    from rorqual.weights import stored_reader

    monkeypatch.setattr(packed, "library", lambda: None)
    monkeypatch.setattr(stored_reader, "library", lambda: None)
    monkeypatch.setattr(kernels, "_machine", lambda kind: kernels.Machine(kind, True))
    path = checkpoint("fp8", WIDE, tmp_path)
    with caplog.at_level("WARNING", logger="rorqual.weights"):
        load(path, "stored")
        assert not caplog.records
        model = load(path, "native")
    assert "the C++ kernels were not built" in caplog.text
    assert {stack.kernels.name for stack in stacks_of(model).values()} == {"decoded"}
