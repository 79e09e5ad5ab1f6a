"""Our checkpoints in transformers and theirs in ours. Oracle: transformers' DeepseekV3ForCausalLM,
its MtpModel, its FP8 path on the CPU, and DeepseekV2ForCausalLM for the softmax form.
"""

from __future__ import annotations

import json
from pathlib import Path

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import save_file

from rorqual.model import DeepseekV3
from rorqual.weights import load, save
from small import lively, random_tokens, randomise, relative_error

FLOAT32_TOLERANCE = 1e-5  # float32 sums in another order
NUM_TOKENS = 40  # past the 16 positions that the YaRN configurations were "trained" on


@torch.no_grad()
def compare(ours: DeepseekV3, theirs: torch.nn.Module, tolerance: float) -> None:
    tokens = random_tokens(ours.config, 2, NUM_TOKENS)
    error = relative_error(ours(tokens), theirs(tokens).logits.float())
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_theirs_in_ours(name: str, tmp_path: Path) -> None:
    config = oracle.CONFIGS[name]
    theirs = oracle.make(config)
    theirs.save_pretrained(tmp_path)
    if not config.num_nextn_predict_layers:
        ours = load(tmp_path)
        assert ours.config.with_changes(initializer_range=0.006) == config
        compare(ours, theirs, FLOAT32_TOLERANCE)
        return
    mtp = oracle.make_mtp(theirs, seed=1)
    add_shard(tmp_path, oracle.mtp_state(theirs, mtp))
    ours = load(tmp_path)
    compare(ours, theirs, FLOAT32_TOLERANCE)
    tokens = random_tokens(config, 2, NUM_TOKENS)
    expected = oracle.mtp_logits(theirs, mtp, tokens)
    found = oracle.our_mtp_logits(ours, tokens)
    assert len(expected) == len(found) == config.num_nextn_predict_layers
    for ours_logits, theirs_logits in zip(found, expected, strict=True):
        assert relative_error(ours_logits, theirs_logits) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_ours_in_theirs(name: str, tmp_path: Path) -> None:
    config = oracle.CONFIGS[name]
    ours = lively(config)
    save(ours, tmp_path, max_shard_bytes=200_000)
    theirs = oracle.read(tmp_path)
    compare(ours, theirs, FLOAT32_TOLERANCE)
    if config.num_nextn_predict_layers:
        tokens = random_tokens(config, 2, NUM_TOKENS)
        expected = oracle.mtp_logits(theirs, oracle.read_mtp(theirs), tokens)
        for found, wanted in zip(oracle.our_mtp_logits(ours, tokens), expected, strict=True):
            assert relative_error(found, wanted) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", ["wide", "wide_no_q_lora", "base", "groups", "yarn", "tied"])
def test_fp8_in_theirs(name: str, tmp_path: Path) -> None:
    """transformers dequantises FP8 on the CPU; ours must be the same numbers, not just near."""
    wide = {"wide": oracle.WIDE, "wide_no_q_lora": oracle.WIDE.with_changes(q_lora_rank=None)}
    config = (wide | oracle.CONFIGS)[name]
    save(lively(config), tmp_path, dtype="fp8", max_shard_bytes=100_000)
    ours = load(tmp_path)
    # The unquantised tensors come as the bfloat16 they are stored in; float32 loses nothing.
    theirs = oracle.read(tmp_path).float()
    compare(ours, theirs, FLOAT32_TOLERANCE)
    state = theirs.state_dict()
    for parameter_name, value in ours.named_parameters():
        assert torch.equal(value, state[parameter_name]), parameter_name


def test_bfloat16_both_ways(tmp_path: Path) -> None:
    theirs = oracle.make(oracle.BASE).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", dtype="bfloat16")
    assert ours.model.layers["1"].mlp.gate.e_score_correction_bias.dtype == torch.float32
    save(ours, tmp_path / "ours", dtype="bfloat16")
    again = oracle.read(tmp_path / "ours", torch.bfloat16)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value.float(), again.state_dict()[name].float()), name
    exact = load(tmp_path / "theirs")
    compare(exact, oracle.read(tmp_path / "ours"), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", ["groups", "mtp_groups_yarn", "v2_groups"])
def test_same_greedy_tokens(name: str, tmp_path: Path) -> None:
    config, num_steps = oracle.CONFIGS[name], 64
    theirs = oracle.make(config, seed=3)
    randomise(theirs, seed=3, std=0.25)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    tokens = random_tokens(config, 1, 8, seed=5)
    expected = theirs.generate(
        tokens, max_new_tokens=num_steps, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        for _ in range(num_steps):
            tokens = torch.cat([tokens, ours(tokens)[:, -1].argmax(-1, keepdim=True)], dim=-1)
    assert tokens.tolist() == expected.tolist()
    assert len(set(tokens[0, 8:].tolist())) > 8, "the continuation is degenerate: no evidence"


def add_shard(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Puts tensors in a second shard beside transformers' single file, with an index."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    from safetensors import safe_open

    with safe_open(folder / first, "pt") as file:
        weight_map = dict.fromkeys(file.keys(), first)
    save_file(state, folder / second, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(state, second)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
