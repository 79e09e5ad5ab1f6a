"""Weights in the forms of stored models. Oracle: the bytes of a model that was loaded so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.errors import UsageError
from rorqual.model import ModelConfig, preset
from rorqual.ops import native
from rorqual.plan import HARDWARE, plan_inference
from rorqual.plan.hardware import USABLE_SHARE
from rorqual.plan.sizes import Runs, expert_bytes, memory_bytes
from rorqual.plan.wish import Wish
from rorqual.weights import load, save
from rorqual.weights.gguf.writer import GgufOptions, write_gguf
from rorqual.weights.open import open_source
from small import SMALL, lively

V3 = preset("671b")
WIDE = SMALL.with_changes(hidden_size=256, moe_intermediate_size=256, qk_nope_head_dim=32)


def checkpoint(format: str, config: ModelConfig, folder: Path) -> Path:
    dtypes = {"fp8": "fp8", "bf16": "bfloat16"}
    save(lively(config), folder / "hf", dtypes.get(format, "float32"))  # type: ignore[arg-type]
    if format in dtypes:
        return folder / "hf"
    with open_source(folder / "hf") as source:
        write_gguf(source, folder / "m.gguf", GgufOptions(format))
    return folder / "m.gguf"


def held(path: Path, form: str) -> int:
    """Bytes of a loaded model, but of its angles and of what it counts."""
    model = load(path, form)  # type: ignore[arg-type]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.nbytes for name, t in tensors if "rotary" not in name and "balance" not in name)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler built the kernels")
@pytest.mark.parametrize("format", ["fp8", "bf16", "Q4_K_M", "Q5_K_M"])
@pytest.mark.parametrize("form", ["native", "int8"])
@pytest.mark.parametrize(
    "config",
    [WIDE, WIDE.with_changes(tie_word_embeddings=True), SMALL],
    ids=["wide", "tied", "odd"],
)
def test_what_a_loaded_model_takes(
    format: str, form: str, config: ModelConfig, tmp_path: Path
) -> None:
    path = checkpoint(format, config, tmp_path)
    assert memory_bytes(config, Runs(format, form), with_mtp=True) == held(path, form)


def test_int8_by_hand() -> None:
    """An expert of V3: three matrices of 7168 x 2048, 34 bytes for 32 values."""
    assert expert_bytes(V3, Runs("fp8", "int8")) == 3 * 7168 * 2048 * 34 / 32
    assert expert_bytes(V3, Runs("fp8", "native")) == 3 * 7168 * 2048 * 2


def test_a_form_is_a_wish() -> None:
    wish = Wish(V3, "fp8", engine="rorqual", dtype="int8")
    assert wish.runs_as == Runs("fp8", "int8")
    assert str(wish.runs_as) == "fp8 as int8"
    assert (wish.cache_format, wish.itemsize) == ("bf16", 4), "as the engine has it"
    cpu = replace(HARDWARE["H200"], is_cpu=True)
    planned = plan_inference(V3, cpu, weights="bf16", engine="rorqual", dtype="int8", kv="float32")
    assert planned.as_dict()["runs_as"] == "bf16 as int8"
    room = planned.memory.total / USABLE_SHARE + 1
    tight = replace(cpu, memory_bytes=room)
    suggested = plan_inference(V3, tight, weights="bf16", engine="rorqual", kv="float32")
    assert not suggested.is_fitting
    assert suggested.suggestions[0].startswith("--dtype int8 ")
    with pytest.raises(UsageError, match="on a CPU only"):
        plan_inference(V3, HARDWARE["H200"], weights="fp8", engine="rorqual", dtype="int8")
