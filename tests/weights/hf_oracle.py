"""transformers' DeepSeek models with tiny random weights: the oracle of the weights tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.model import DeepseekV3, ModelConfig, YarnScaling

YARN = YarnScaling(factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
BASE = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    max_position_embeddings=256,
)
SOFTMAX = BASE.with_changes(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
# Several whole FP8 blocks: transformers' dequantiser refuses edge blocks where there are several
# (also the 576 rows of the release), so those have a plain twin in test_block_fp8.py.
WIDE = BASE.with_changes(
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=128,
    v_head_dim=64,
)

CONFIGS: dict[str, ModelConfig] = {
    "base": BASE,
    "no_q_lora": BASE.with_changes(q_lora_rank=None),
    "groups": BASE.with_changes(n_group=4, topk_group=2),
    "half_of_groups": BASE.with_changes(
        n_routed_experts=16, n_group=8, topk_group=4, num_experts_per_tok=6
    ),
    "mtp": BASE.with_changes(num_nextn_predict_layers=1),
    "two_mtp": BASE.with_changes(num_nextn_predict_layers=2),
    "mtp_groups_yarn": BASE.with_changes(
        num_nextn_predict_layers=1, n_group=2, topk_group=1, rope_scaling=YARN
    ),
    "yarn": BASE.with_changes(rope_scaling=YARN),
    "yarn_mscales_differ": BASE.with_changes(
        rope_scaling=YarnScaling(
            factor=40, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.0
        )
    ),
    "tied": BASE.with_changes(tie_word_embeddings=True),
    "tied_mtp": BASE.with_changes(tie_word_embeddings=True, num_nextn_predict_layers=1),
    "two_shared": BASE.with_changes(n_shared_experts=2),
    "all_dense_but_one": BASE.with_changes(first_k_dense_replace=2),
    "all_sparse": BASE.with_changes(first_k_dense_replace=0, n_group=2, topk_group=1),
    "not_normalised": BASE.with_changes(norm_topk_prob=False, routed_scaling_factor=1.0),
    # rms_norm_eps stays 1e-6: transformers gives the norms inside MLA that value always.
    "theta": BASE.with_changes(rope_theta=50000.0),
    "v2_greedy": SOFTMAX.with_changes(q_lora_rank=None, n_shared_experts=2),
    "v2_groups": SOFTMAX.with_changes(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
    "v2_yarn": SOFTMAX.with_changes(rope_scaling=YARN),
}


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((ours - theirs).norm() / theirs.norm())


def randomise(module: nn.Module, seed: int, std: float = 0.08) -> None:
    """Weights large enough that attention and routing matter, norms near one, biases that steer."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    places = {n: v for n, v in named.items() if n in module.state_dict() or n.endswith("inv_freq")}
    with torch.no_grad():
        for name, value in sorted(places.items()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                value.copy_(1 + 0.1 * noise)
            elif name.endswith("e_score_correction_bias"):
                value.copy_(0.05 * noise)
            elif value.dim() > 1:
                value.copy_(std * noise)


def make(config: ModelConfig, seed: int = 0) -> Any:
    """transformers' model of this shape, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    table = config.to_hf()
    hf_config = AutoConfig.for_model(**table)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    randomise(model, seed)
    return model


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers makes of a folder; fails if it found keys missing or misshapen."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    config = model.config
    extra = tuple(
        f"model.layers.{config.num_hidden_layers + k}."
        for k in range(getattr(config, "num_mtp_layers", 0))
    )
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(extra or ("-",))]
    assert not unexpected, unexpected
    return model.eval()


def forget_layer_61(model: Any) -> None:
    """transformers knows MTP layers by the name of layer 61; our tiny models have fewer layers."""
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{model.config.num_hidden_layers + k}\..*"
        for k in range(model.config.num_mtp_layers)
    ]


def read_mtp(main: Any) -> Any:
    from transformers.modeling_layers import MtpModel

    forget_layer_61(main)
    return MtpModel.from_pretrained(main).eval()


def make_mtp(main: Any, seed: int) -> Any:
    from transformers.modeling_layers import MtpModel

    shared = {name: value.clone() for name, value in main.state_dict().items()}
    model = MtpModel(main, main.config.num_mtp_layers).eval()
    randomise(model, seed)
    main.load_state_dict(shared)  # embedding and head are shared: put them back
    return model


def mtp_state(main: Any, mtp: Any) -> dict[str, Tensor]:
    """The MTP modules' tensors under the checkpoint's names, repeated ones included."""
    state: dict[str, Tensor] = {}
    for depth, layer in enumerate(mtp.layers):
        prefix = f"model.layers.{main.config.num_hidden_layers + depth}."
        for name, value in layer.state_dict().items():
            name = name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm")
            if "experts.gate_up_proj" in name:
                for e, (gate, up) in enumerate(v.chunk(2) for v in value):
                    state[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate.clone()
                    state[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up.clone()
            elif "experts.down_proj" in name and "shared" not in name:
                for e, down in enumerate(value):
                    state[f"{prefix}mlp.experts.{e}.down_proj.weight"] = down.clone()
            else:
                state[prefix + name] = value.clone()
        state[prefix + "embed_tokens.weight"] = main.get_input_embeddings().weight.detach().clone()
        state[prefix + "shared_head.head.weight"] = main.lm_head.weight.detach().clone()
    return state


@torch.no_grad()
def mtp_logits(main: Any, mtp: Any, tokens_BT: Tensor) -> list[Tensor]:
    """Logits of each depth from transformers, for the positions that have all their tokens."""
    hidden = main.model(tokens_BT).last_hidden_state
    logits = []
    for depth in range(1, len(mtp.layers) + 1):
        next_tokens = tokens_BT[:, depth:]
        hidden = hidden[:, : next_tokens.shape[1]]
        positions = torch.arange(next_tokens.shape[1])[None]
        hidden = mtp.forward_layer(depth - 1, hidden, positions, None, input_ids=next_tokens)
        logits.append(main.lm_head(hidden).float())
    return logits


@torch.no_grad()
def our_mtp_logits(model: DeepseekV3, tokens_BT: Tensor) -> list[Tensor]:
    hidden = model.hidden(tokens_BT)
    logits = []
    for depth in range(1, model.config.num_nextn_predict_layers + 1):
        next_tokens = tokens_BT[:, depth:]
        hidden = hidden[:, : next_tokens.shape[1]]
        hidden = model.mtp_hidden(depth, hidden, next_tokens)
        logits.append(model.head(hidden))
    return logits
