"""Names and shapes. Oracles: the released checkpoint's counts, and the files that
transformers writes.
"""

from __future__ import annotations

from pathlib import Path

import hf_oracle as oracle
import pytest
import torch
from safetensors import safe_open

from rorqual.errors import UsageError
from rorqual.model import empty, preset
from rorqual.weights.names import HEAD, IGNORED, tensors_of
from rorqual.weights.planned import planned_tensors


def test_the_released_checkpoint() -> None:
    stored = planned_tensors(preset("671b"), "fp8")
    assert len(stored) == len({tensor.name for tensor in stored}) == 91_991
    assert sum(torch.Size(tensor.shape).numel() for tensor in stored) == 684_531_386_000


def test_what_is_fp8() -> None:
    stored = {t.name: t for t in planned_tensors(preset("671b"), "fp8")}
    dtype = {name: tensor.dtype for name, tensor in stored.items()}
    assert dtype["model.layers.61.eh_proj.weight"] == "BF16"
    assert dtype["model.layers.61.embed_tokens.weight"] == "BF16"
    assert dtype["model.layers.61.shared_head.head.weight"] == "BF16"
    assert dtype["model.layers.3.mlp.gate.weight"] == "BF16"
    assert dtype["model.layers.3.mlp.gate.e_score_correction_bias"] == "F32"
    assert dtype["model.layers.0.mlp.down_proj.weight"] == "F8_E4M3"
    name = "model.layers.61.self_attn.kv_a_proj_with_mqa.weight"
    assert dtype[name] == "F8_E4M3"
    assert stored[name].shape == (576, 7168)
    assert stored[name + "_scale_inv"].shape == (5, 56)
    fp8 = {name.split(".")[3] for name, kind in dtype.items() if kind == "F8_E4M3"}
    assert fp8 == {"self_attn", "mlp"}


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_every_parameter_is_filled_once(name: str) -> None:
    config = oracle.CONFIGS[name]
    model = empty(config, device="meta")
    stored = model.state_dict().keys()
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    places = {name: value for name, value in named.items() if name in stored}
    filled = {key: torch.zeros(value.shape, dtype=torch.int64) for key, value in places.items()}
    for tensor in tensors_of(config):
        part = tensor.part_of(filled[tensor.parameter])
        assert tuple(part.shape) == tensor.shape, tensor.name
        if tensor.kind != "copy":
            part += 1
    for key, count in filled.items():
        assert bool((count == 1).all()), key


@pytest.mark.parametrize("name", ["base", "no_q_lora", "two_shared", "tied", "v2_groups"])
def test_names_are_those_transformers_writes(name: str, tmp_path: Path) -> None:
    config = oracle.CONFIGS[name]
    oracle.make(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    ours = {tensor.name: tensor.shape for tensor in planned_tensors(config, "float32")}
    assert ours == theirs


def test_options() -> None:
    config = oracle.CONFIGS["tied_mtp"]
    names = {tensor.name for tensor in planned_tensors(config, "bfloat16")}
    short = {t.name for t in planned_tensors(config, "bfloat16", repeat_mtp_embedding=False)}
    layer = "model.layers.3."
    assert names - short == {layer + "embed_tokens.weight", layer + "shared_head.head.weight"}
    assert HEAD not in names
    assert IGNORED.search("model.layers.0.self_attn.rotary_emb.inv_freq")
    with pytest.raises(UsageError, match="int4"):
        planned_tensors(config, "int4")  # type: ignore[arg-type]
