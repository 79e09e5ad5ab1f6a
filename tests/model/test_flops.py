"""Counts in closed form. Oracles: the model on the meta device, transformers' models there, and
the released model's own figures; FLOPs against torch's FlopCounterMode.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import CONFIGS
from torch.utils.flop_counter import FlopCounterMode

from rorqual.model import PRESETS, DeepseekV3, ModelConfig, empty, preset
from rorqual.model.flops import (
    count_parameters,
    forward_flops_per_token,
    kv_bytes_per_token,
    training_flops_per_token,
)
from rorqual.model.served import use_kernels
from small import SMALL, lively, random_tokens

EXACT = 1e-12  # integers, equal but for the rounding of a float
SHAPES = CONFIGS | PRESETS


def numel(model: DeepseekV3, *prefixes: str) -> int:
    """Parameters and stored buffers under any of the prefixes, a tied tensor once."""
    seen: dict[int, int] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.startswith(prefixes):
            seen[id(value)] = value.numel()
    return sum(seen.values())


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_the_models(name: str) -> None:
    config = SHAPES[name]
    model, count = empty(config, device="meta"), count_parameters(config)
    first = config.num_hidden_layers
    mtp_prefixes = tuple(
        f"model.layers.{first + k}." for k in range(config.num_nextn_predict_layers)
    )
    assert count.total + count.mtp == numel(model, "")
    assert count.mtp == (numel(model, *mtp_prefixes) if mtp_prefixes else 0)
    assert count.embedding == model.model.embed_tokens.weight.numel()
    assert count.head == (0 if config.tie_word_embeddings else model.lm_head.weight.numel())


def test_checkpoints_repeat_what_a_tied_model_shares() -> None:
    """Each MTP layer has an embedding and a head of its own in a file, tied or not."""
    for is_tied in (False, True):
        config = SMALL.with_changes(num_nextn_predict_layers=2, tie_word_embeddings=is_tied)
        count = count_parameters(config)
        repeated = 2 * 2 * config.vocab_size * config.hidden_size
        assert count.mtp_repeated == count.mtp + repeated


def test_the_released_figures() -> None:
    count = count_parameters(preset("671b"))
    assert count.total == 671_026_419_200
    assert count.activated == 37_552_282_624
    assert count.mtp == 11_610_068_224
    assert f"{count.mtp_repeated / 1e9:.2f}" == "13.46"
    assert f"{(count.activated - count.embedding) / 1e9:.2f}" == "36.63"
    assert kv_bytes_per_token(preset("671b")) == 61 * 576 * 2
    # §4.2: 180K H800 hours a trillion tokens; the rate that needs must lie below the FP8 peak.
    flops_per_second = training_flops_per_token(preset("671b"), 4096) * 1e12 / (180e3 * 3600)
    assert 200e12 < flops_per_second < 1979e12


@pytest.mark.parametrize(("name", "billions"), [("16b", 15.7), ("236b", 235.7)])
def test_v2_totals_are_transformers(name: str, billions: float) -> None:
    config = preset(name)
    theirs = meta_model(config)
    assert count_parameters(config).total == sum(p.numel() for p in theirs.parameters())
    assert round(count_parameters(config).total / 1e9, 1) == billions


def meta_model(config: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()))


@pytest.mark.parametrize("name", ["base", "no_q_lora", "groups", "tied", "two_shared", "v2_groups"])
def test_forward_flops_are_counted_ones(name: str) -> None:
    config, num_tokens = CONFIGS[name], 24
    model = lively(config)
    use_kernels(model, "plain")  # FlopCounterMode does not see into our custom operator
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_tokens(config, 1, num_tokens))
    # The plain attention multiplies masked pairs too, so each token sees every key.
    expected = num_tokens * forward_flops_per_token(config, num_tokens)
    assert counter.get_total_flops() == pytest.approx(expected, rel=EXACT)


def test_mtp_and_absorbed_flops() -> None:
    config, num_tokens = SMALL.with_changes(num_nextn_predict_layers=2), 16
    model = lively(config)
    use_kernels(model, "plain")
    sequence = random_tokens(config, 1, num_tokens)
    step = model.model.step(sequence, use_absorbed=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        h_BTD = model.hidden(sequence, step)
        model.head(h_BTD)
        for depth in (1, 2):
            h_BTD = model.mtp_hidden(depth, h_BTD, sequence, step)
            model.head(h_BTD)
    expected = num_tokens * forward_flops_per_token(
        config, num_tokens, use_absorbed=True, with_mtp=True
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=EXACT)


def test_training_is_three_forwards_of_the_mean_context() -> None:
    by_position = [forward_flops_per_token(SMALL, n + 1, with_mtp=True) for n in range(100)]
    mean = sum(by_position) / 100
    assert training_flops_per_token(SMALL, 100) == pytest.approx(3 * mean)


def test_cache_bytes() -> None:
    config = SMALL.with_changes(num_nextn_predict_layers=1)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert kv_bytes_per_token(config, 4) == 3 * width * 4
    assert kv_bytes_per_token(config, 4, with_mtp=True) == 4 * width * 4
