"""Edges of a model's shape: the last value that is taken and the first that is not, defaults, and
which of two keys wins. Oracles: the released code's defaults, formulas by hand.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from shapes import CONFIGS

from rorqual.errors import ConfigError
from rorqual.model import ModelConfig, YarnScaling, unknown_keys
from rorqual.model.config_keys import (
    MATHEMATICS_PREFIXES,
    ROPE_MATHEMATICS,
    WHOLE_ATTENTION,
    other_model,
)
from rorqual.model.router import Router
from small import SMALL, lively, random_tokens

SCALING = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}


def read(**changes: Any) -> ModelConfig:
    table = SMALL.to_hf() | changes
    return ModelConfig.from_hf({key: value for key, value in table.items() if value is not ...})


def refused(said: str, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        read(**changes)


POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "routed_scaling_factor",
    "initializer_range",
)  # fmt: skip


@pytest.mark.parametrize("name", POSITIVE)
def test_sizes_are_positive(name: str) -> None:
    refused(name, **{name: 0})
    refused(name, **{name: -1})


@pytest.mark.parametrize(
    "name", ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"]
)
def test_numbers_are_finite(name: str) -> None:
    refused(name, **{name: math.inf})
    refused(name, **{name: math.nan})
    assert getattr(read(**{name: 1e-30}), name) == 1e-30


def test_what_may_be_nought() -> None:
    for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
        assert getattr(read(**{name: 0}), name) == 0
        refused(name, **{name: -1})
    assert read(q_lora_rank=0).q_lora_rank is None
    refused("q_lora_rank", q_lora_rank=-1)


def test_null_is_the_default() -> None:
    found = read(n_group=None, topk_group=None, first_k_dense_replace=None)
    assert (found.n_group, found.topk_group, found.first_k_dense_replace) == (1, 1, 0)
    assert read(num_nextn_predict_layers=None).num_nextn_predict_layers == 0
    assert read(n_shared_experts=None).n_shared_experts is None


def test_as_many_experts_as_the_kept_groups_have() -> None:
    groups = {"n_group": 4, "topk_group": 2}  # of 2 experts each
    assert read(num_experts_per_tok=4, **groups).num_experts_per_tok == 4
    refused("exceeds the 4 experts", num_experts_per_tok=5, **groups)
    assert read(n_group=8, topk_group=8, num_experts_per_tok=8).topk_group == 8
    refused("topk_group 9 exceeds n_group 8", n_group=8, topk_group=9)
    v2 = {"scoring_func": "softmax", "architectures": ["DeepseekV2ForCausalLM"]}
    assert read(num_experts_per_tok=8, topk_method="greedy", **groups, **v2).num_experts_per_tok
    refused("exceeds the 8", num_experts_per_tok=9, topk_method="greedy", **groups, **v2)
    refused("exceeds the 4", num_experts_per_tok=5, topk_method="group_limited_greedy",
            **groups, **v2)  # fmt: skip
    refused("V3 has sigmoid", topk_method="greedy")


def test_dense_layers_come_first_and_mtp_layers_are_sparse() -> None:
    config = SMALL.with_changes(first_k_dense_replace=2)
    assert [config.is_moe_layer(i) for i in range(4)] == [False, False, True, True]
    dense = SMALL.with_changes(first_k_dense_replace=9)
    assert [dense.is_moe_layer(i) for i in range(4)] == [False, False, False, True]


def test_widths_and_scales() -> None:
    assert (SMALL.qk_head_dim, SMALL.latent_dim, SMALL.num_layers_with_mtp) == (24, 24, 4)
    assert SMALL.softmax_scale == 24**-0.5
    assert SMALL.with_changes(kv_lora_rank=17).latent_dim == 25
    yarn = YarnScaling(factor=4, original_max_position_embeddings=32, mscale_all_dim=0.5)
    stretch = 0.1 * 0.5 * math.log(4) + 1
    assert yarn.softmax_mscale == stretch
    scaled = SMALL.with_changes(rope_scaling=yarn).softmax_scale
    assert scaled == pytest.approx(24**-0.5 * stretch**2, rel=1e-15)
    assert yarn.rope_magnitude == pytest.approx((0.1 * math.log(4) + 1) / stretch, rel=1e-15)


@pytest.mark.parametrize(
    ("factor", "mscale", "all_dim", "softmax", "rope"),
    [
        (1.0, 1.0, 1.0, 1.0, 1.0),  # nothing is stretched
        (0.5, 1.0, 1.0, 1.0, 1.0),
        (40.0, 0.707, 0.0, 1.0, 0.1 * math.log(40) + 1),  # one of the two alone: mscale of 1
        (40.0, 0.0, 0.707, 0.0707 * math.log(40) + 1, 0.1 * math.log(40) + 1),
        (40.0, 0.707, 0.707, 0.0707 * math.log(40) + 1, 1.0),
    ],
)
def test_yarns_two_magnitudes(
    factor: float, mscale: float, all_dim: float, softmax: float, rope: float
) -> None:
    """DeepSeek's modelling code: yarn_get_mscale, and where mscale_all_dim is 0."""
    yarn = YarnScaling(factor, 32, mscale=mscale, mscale_all_dim=all_dim)
    assert yarn.softmax_mscale == pytest.approx(softmax, rel=1e-15)
    assert yarn.rope_magnitude == pytest.approx(rope, rel=1e-15)


def test_what_yarn_leaves_out() -> None:
    found = read(rope_scaling={"type": "yarn", "factor": 2}).rope_scaling
    assert found == YarnScaling(2.0, SMALL.max_position_embeddings)
    assert (found.beta_fast, found.beta_slow, found.mscale, found.mscale_all_dim) == (32, 1, 1, 0)
    null = SCALING | {"beta_fast": None, "mscale": None}
    assert read(rope_scaling=null).rope_scaling == YarnScaling(4.0, 32)
    refused("original_max", rope_scaling={"type": "yarn", "factor": 2}, max_position_embeddings=...)
    assert read(rope_scaling=None).rope_scaling is None
    assert read(rope_scaling={}).rope_scaling is None
    assert read(rope_scaling={"rope_type": "default"}).rope_scaling is None
    # transformers' newer name wins over the older one.
    both = SCALING | {"rope_type": "yarn", "type": "linear"}
    assert read(rope_scaling=both).rope_scaling == YarnScaling(4.0, 32)
    refused(
        "'linear' is not supported", rope_scaling=both | {"rope_type": "linear", "type": "yarn"}
    )


def test_an_attention_factor_that_says_the_same() -> None:
    """Six digits of it count."""
    factor = 0.1 * math.log(4) + 1
    for fine in (None, factor, factor * (1 + 5e-7)):
        assert read(rope_scaling=SCALING | {"attention_factor": fine}).rope_scaling is not None
    for wrong in (factor * (1 + 2e-6), 1.0, "1.13863"):
        refused("attention_factor", rope_scaling=SCALING | {"attention_factor": wrong})


@pytest.mark.parametrize(
    ("names", "model_type", "scoring"),
    [
        (["DeepseekV3ForCausalLM"], "kimi_k2", "sigmoid"),
        ("DeepseekV3ForCausalLM", None, "sigmoid"),
        (["Whale", "DeepseekV2ForCausalLM"], "deepseek_v3", "softmax"),
        ([], "deepseek_v3", "sigmoid"),
        (None, "kimi_k2", "sigmoid"),
        (None, "deepseek_v2", "softmax"),
        (["Whale"], "deepseek_v3", None),
        (None, "deepseek", None),
        (None, None, None),
    ],
)
def test_which_architecture_it_is(names: Any, model_type: Any, scoring: str | None) -> None:
    changes = {"architectures": names, "model_type": model_type}
    changes |= dict.fromkeys(("scoring_func", "topk_method", "norm_topk_prob"), ...)
    if scoring is None:
        refused("not a DeepSeek-V3-architecture", **changes)
        return
    found = read(**changes)
    is_v3 = scoring == "sigmoid"
    assert (found.scoring_func, found.norm_topk_prob) == (scoring, is_v3)
    assert found.topk_method == ("noaux_tc" if is_v3 else "greedy")
    table = found.to_hf()
    assert table["architectures"] == [f"DeepseekV{3 if is_v3 else 2}ForCausalLM"]
    assert table["model_type"] == f"deepseek_v{3 if is_v3 else 2}"
    assert table["num_key_value_heads"] == SMALL.num_attention_heads


def test_keys_that_mean_nothing_are_named_in_order() -> None:
    table = SMALL.to_hf() | {"zeta": 1, "alpha_whale": 2, "hidden_act": "silu", "layer_types": None}
    table["rope_scaling"] = SCALING | {"whale": 1, "factor": 2, "truncate": True}
    table["rope_parameters"] = {"rope_theta": 1.0, "orca": 2}
    assert unknown_keys(table) == [
        "alpha_whale", "zeta", "rope_scaling.whale", "rope_parameters.orca",
    ]  # fmt: skip


def test_mathematics_by_the_beginning_of_its_key() -> None:
    for prefix in MATHEMATICS_PREFIXES:
        refused(f"{prefix}whale is not supported", **{f"{prefix}whale": 3})
        for off in (None, False, [], {}):
            assert read(**{f"{prefix}whale": off}) == SMALL
    for key, neutral in ROPE_MATHEMATICS.items():
        for value in neutral:
            assert read(rope_scaling=SCALING | {key: value}).rope_scaling is not None
        refused(rf"rope_scaling\.{key} is not supported", rope_scaling=SCALING | {key: 7})


def test_a_window_counts_unless_its_switch_is_off() -> None:
    assert read(sliding_window=4096, use_sliding_window=False) == SMALL
    for switch in (..., None, True):
        refused("sliding_window", sliding_window=4096, use_sliding_window=switch)
    refused("window_size", window_size=4096, use_sliding_window=False)


def test_layers_that_attend_to_the_whole_text() -> None:
    assert read(layer_types=[*WHOLE_ATTENTION]) == SMALL
    refused("do not attend", layer_types=["full_attention", "chunked"])
    assert read(mlp_layer_types=["dense", "sparse", "sparse"]) == SMALL
    refused("contradict", mlp_layer_types=["dense", "dense", "sparse"])
    refused("contradict", mlp_layer_types=["sparse", "sparse"])


def test_names_of_other_models() -> None:
    assert other_model([], "glm4_moe_lite") == "GLM-4 MoE Lite"
    assert other_model(["Whale", "DeepseekV4ForCausalLM"], "llama") == "DeepSeek-V4"
    assert other_model(["Whale"], "llama") == "Llama, as in R1-Distill-Llama"
    assert other_model(["Whale"], None) is None


@torch.no_grad()
def test_a_group_may_be_a_single_expert() -> None:
    """Then its score is the one it has, and the choice that of the best experts."""
    made = Router(SMALL.with_changes(n_group=8, topk_group=4))
    made.weight.normal_(0, 0.5)
    made.e_score_correction_bias.normal_(0, 0.3)
    routing = made(torch.randn(30, SMALL.hidden_size))
    best = (routing.scores_TE + made.e_score_correction_bias).topk(2, dim=-1).indices
    assert torch.equal(routing.experts_TK, best)


@torch.no_grad()
def test_all_groups_kept_are_none() -> None:
    config = SMALL.with_changes(n_group=4, topk_group=4, num_experts_per_tok=8)
    made = Router(config)
    made.weight.normal_(0, 0.5)
    assert (
        made(torch.randn(3, SMALL.hidden_size)).experts_TK.sort().values.tolist()
        == [list(range(8))] * 3
    )


@torch.no_grad()
def test_padding_and_neighbours_change_no_document() -> None:
    """A document between two others, with padding behind."""
    model = lively(CONFIGS["yarn"])
    before, after = random_tokens(SMALL, 1, 5), random_tokens(SMALL, 1, 3, seed=2)
    ids = random_tokens(SMALL, 1, 8, seed=1)
    packed = torch.cat([before, ids, after, torch.zeros(1, 4, dtype=torch.int64)], 1)
    documents = torch.tensor([[1] * 5 + [2] * 8 + [3] * 3 + [0] * 4])
    whole = model.hidden(packed, model.model.step(packed, documents))
    alone = model.hidden(ids)
    torch.testing.assert_close(whole[:, 5:13], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[:, 13:16], model.hidden(after), rtol=1e-4, atol=1e-5)
