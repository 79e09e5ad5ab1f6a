"""config.json in all its spellings, and what is refused. Oracles: released files, transformers."""

from __future__ import annotations

from typing import Any

import pytest
from released_configs import RELEASED, UNSLOTH, V2, V2_LITE, V3
from shapes import CONFIGS

from rorqual.errors import ConfigError
from rorqual.model import PRESETS, ModelConfig, preset, unknown_keys
from small import SMALL

# Values that leave V3's mathematics as it is, under keys of other programs and models.
OTHERS_KEYS: dict[str, Any] = {
    "torchscript": False, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None, "mlp_layer_types": ["dense", "sparse", "sparse"],
    "index_topk": None, "qk_layernorm": False, "attn_logit_softcapping": None, "mlp_bias": None,
    "logits_scaling": 1.0, "embedding_multiplier": 1, "partial_rotary_factor": 1.0,
    "no_rope_layers": [], "hidden_activation": "silu", "attention_dropout": 0.1,
    "bad_words_ids": None, "do_sample": False, "num_beams": 1, "tokenizer_class": None,
    "cross_attention_hidden_size": None, "tie_encoder_decoder": False, "pruned_heads": {},
    "task_specific_params": None, "_load_in_4bit": False, "quantization": None,
    "axolotl_config": {"lora_r": 16}, "trl_version": "0.21", "kv_cache_dtype": "auto",
    "vllm_dtype": "bfloat16", "sglang_version": "0.5", "mlx_version": "0.29", "mtp_loss": 0.1,
    "router_aux_loss_coef": 0.001, "routed_scaling": "none", "rope_theta": 10000.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PRESETS])
def test_presets_survive_their_own_json(name: str) -> None:
    assert ModelConfig.from_hf(preset(name).to_hf()) == preset(name)


@pytest.mark.parametrize("name", [*RELEASED])
def test_released_configs_are_read_without_a_word(name: str) -> None:
    table = RELEASED[name]
    config = ModelConfig.from_hf(table)
    for key in ("hidden_size", "n_routed_experts", "n_group", "vocab_size", "norm_topk_prob"):
        assert getattr(config, key) == table[key]
    strange = [key for key in unknown_keys(table) if key not in UNSLOTH]
    assert strange == []


def test_released_configs_are_the_presets() -> None:
    """The presets were written down from the papers."""
    for released, name in ((V2, "236b"), (V2_LITE, "16b"), (V3, "671b")):
        ours = preset(name).with_changes(initializer_range=0.02)
        assert ModelConfig.from_hf(released) == ours


def test_keys_of_other_programs_are_accepted_and_named() -> None:
    """As transformers, unsloth, axolotl, TRL, vLLM, mlx and SGLang write them."""
    config = ModelConfig.from_hf(SMALL.to_hf() | OTHERS_KEYS | UNSLOTH)
    assert config == SMALL
    named = unknown_keys(SMALL.to_hf() | OTHERS_KEYS | UNSLOTH)
    assert {"unsloth_version", "_attn_implementation_autoset", "torchscript"} <= set(named)
    assert not {"use_sliding_window", "layer_types", "hidden_size"} & set(named)


def test_unknown_keys_of_rope_are_accepted_and_named() -> None:
    table = CONFIGS["yarn"].to_hf()
    table["rope_scaling"] |= {"finetuned": True, "rope_type": "yarn", "attention_factor": 1.0}
    assert ModelConfig.from_hf(table) == CONFIGS["yarn"]
    assert unknown_keys(table) == ["rope_scaling.finetuned"]


def test_both_spellings_of_rope_are_read() -> None:
    old = CONFIGS["yarn"].to_hf()
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = dict(old["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    new["rope_parameters"] = {**scaling, "rope_theta": old["rope_theta"]}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old) == CONFIGS["yarn"]


def test_two_spellings_of_rope_must_agree() -> None:
    """Readers differ in which of the two they take, so neither may win in silence."""
    table = CONFIGS["yarn"].to_hf()
    same = {**table["rope_scaling"], "rope_theta": table["rope_theta"]}
    assert ModelConfig.from_hf(table | {"rope_parameters": same}) == CONFIGS["yarn"]
    assert ModelConfig.from_hf(table | {"rope_parameters": {}}) == CONFIGS["yarn"]
    for other in ({"rope_type": "default"}, {**same, "factor": 2}, {**same, "rope_theta": 5e4}):
        with pytest.raises(ConfigError, match="contradict"):
            ModelConfig.from_hf(table | {"rope_parameters": other})
    null = {**same, "rope_theta": None}
    changed = ModelConfig.from_hf(table | {"rope_theta": 5e4, "rope_parameters": null})
    assert changed == CONFIGS["yarn"].with_changes(rope_theta=5e4)


def test_the_other_name_of_the_mtp_layers_counts_where_ours_is_null() -> None:
    for ours in ({}, {"num_nextn_predict_layers": None}):
        table = SMALL.to_hf() | {"num_mtp_layers": 2}
        del table["num_nextn_predict_layers"]
        assert ModelConfig.from_hf(table | ours).num_nextn_predict_layers == 2


def test_transformers_reads_what_we_write_and_we_read_what_it_writes() -> None:
    from transformers import DeepseekV3Config

    for name in ("base", "yarn", "two_mtp"):
        theirs = DeepseekV3Config(**CONFIGS[name].to_hf())
        written = {**theirs.to_dict(), "architectures": ["DeepseekV3ForCausalLM"]}
        assert ModelConfig.from_hf(written) == CONFIGS[name]
        assert unknown_keys(written) == []
    defaults = DeepseekV3Config().to_dict()
    assert ModelConfig.from_hf(defaults).n_routed_experts == 256
    assert unknown_keys(defaults) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "not a DeepSeek-V3"),
        ({"architectures": 3}, "not a list of names"),
        ({"architectures": [{}]}, "not a list of names"),
        ({"hiden_size": 64}, "did you mean 'hidden_size'"),
        ({"n_routed_expert": 8}, "did you mean 'n_routed_experts'"),
        ({"num_routed_experts": 8}, "did you mean 'n_routed_experts'"),
        ({"hiddenSize": 64}, "did you mean 'hidden_size'"),
        ({"ropescaling": {}}, "did you mean 'rope_scaling'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "contradict"),
        ({"layer_types": 3}, "layer_types is not a list"),
        ({"layer_types": "full_attention"}, "layer_types is not a list"),
        ({"mlp_layer_types": 3}, "mlp_layer_types is not a list"),
        ({"mlp_layer_types": ["dense"], "first_k_dense_replace": "x"}, "first_k_dense_replace"),
        ({"index_topk": 2048}, "index_topk"),
        ({"index_n_heads": 64, "index_head_dim": 128}, "index_"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"n_group": 3}, "not a multiple of n_group"),
        ({"topk_group": 2}, "topk_group 2 exceeds"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds"),
        ({"qk_rope_head_dim": 7}, "odd"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": 4}, "not an object"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "llama3"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fas": 1}},
            "scaling.beta_fast'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.0}}, "1.13863"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "kind of layer"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "factor"),
        ({"scoring_func": "softmax"}, "scoring_func"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.json") as caught:
        ModelConfig.from_hf({**SMALL.to_hf(), **changes}, where="here.json")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "model_type", "said"),
    [
        ("Qwen2ForCausalLM", "qwen2", "R1-Distill-Qwen"),
        ("LlamaForCausalLM", "llama", "R1-Distill-Llama"),
        ("DeepseekV32ForCausalLM", "deepseek_v32", "DeepSeek-V3.2"),
        (None, "deepseek_v32", "DeepSeek-V3.2"),
        ("KimiLinearForCausalLM", "kimi_linear", "Kimi-Linear"),
        ("WhaleForCausalLM", "whale", "WhaleForCausalLM"),
    ],
)
def test_other_models_are_named_with_software_that_runs_them(
    architecture: str | None, model_type: str, said: str
) -> None:
    names = {"architectures": architecture and [architecture], "model_type": model_type}
    with pytest.raises(ConfigError, match="vLLM") as caught:
        ModelConfig.from_hf({**SMALL.to_hf(), **names})
    assert said in str(caught.value)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="671b"):
        preset("670b")


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_routing_keys_that_are_left_out_mean_what_they_mean_in_transformers(name: str) -> None:
    import transformers

    theirs = getattr(transformers, f"{name}Config")()
    table = {**preset("16b").to_hf(), "architectures": [f"{name}ForCausalLM"]}
    for key in ("norm_topk_prob", "scoring_func", "topk_method"):
        del table[key]
    assert ModelConfig.from_hf(table).norm_topk_prob == theirs.norm_topk_prob


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": True},
        {"layer_types": "full_attention"},
        {"layer_types": {"0": "full_attention"}},
        {"layer_types": [["full_attention"]]},
        {"mlp_layer_types": {"a": 1}},
        {"mlp_layer_types": 3},
        {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": "x"},
        {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": [1]},
        {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 0.5},
        {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": float("nan")},
        {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": float("inf")},
        {"first_k_dense_replace": "x"},
    ],
)
def test_lists_of_layers_of_another_type_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes)) + "|first_k_dense_replace"):
        ModelConfig.from_hf({**V3, **changes})


@pytest.mark.parametrize("num_listed", [2, 3, 4])
def test_lists_of_layers_may_be_all_dense(num_listed: int) -> None:
    """More dense layers than there are, or than are listed, contradict nothing."""
    table = {**V3, "num_hidden_layers": 3, "first_k_dense_replace": 3}
    table["mlp_layer_types"] = ["dense"] * num_listed
    if num_listed < 4:
        assert ModelConfig.from_hf(table).first_k_dense_replace == 3
        return
    with pytest.raises(ConfigError, match="mlp_layer_types"):
        ModelConfig.from_hf(table)
